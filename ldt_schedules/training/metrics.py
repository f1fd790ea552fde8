"""Figures of a run for programs: `metrics.jsonl` (one JSON object a line) and TensorBoard. Written on the edge only.

    {"event": "step", "iteration": 1, "loss": 5.95, "grad_norm": 2.1, "lr": 0.0002, ...}       fields of StepReport
    {"event": "evaluation", "iteration": 50, "loss": 2.31, "samples": 64}                      fields of EvalReport

A value that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.site_directory import Saved
from ldt_schedules.training.reports import EvalReport, StepReport

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


class MetricsWriter:
    """Writes both; use as a context manager. Every line is complete on disk before the next step.

    Args:
        output_dir: made if it is not there.
        start_iteration: steps already done. Lines of later steps, left by a run that went further than its last
            checkpoint, are dropped: they will be written again. 0 starts a new file.

    Raises:
        ConfigError: the directory cannot be written.
    """

    def __init__(self, output_dir: str | Path, start_iteration: int = 0) -> None:
        self.path = Path(output_dir) / METRICS_FILE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = _lines_until(self.path, start_iteration)
            self._file = self.path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(f"train.output_dir {output_dir} cannot be written: {error.strerror}") from None
        self._file.writelines(kept)
        self._board = _summary_writer(self.path.parent / TENSORBOARD_DIR, start_iteration)

    def report(self, report: StepReport | EvalReport | Saved) -> None:
        """Write down what just happened."""
        fields = asdict(report)
        if isinstance(report, StepReport):
            self._write("step", fields)
            for name, value in fields.items():
                if value is not None and name not in ("iteration", "skipped"):
                    self._board.add_scalar(f"train/{name}", value, report.iteration)
        elif isinstance(report, EvalReport):
            self._write("evaluation", fields)
            self._board.add_scalar("validation/loss", report.loss, report.iteration)
        else:
            self._write("checkpoint", fields)

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        # JSON has no nan and no inf; other programs would refuse the line.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        self._file.write(json.dumps({"event": event, **clean}) + "\n")


def _lines_until(path: Path, iteration: int) -> list[str]:
    if iteration == 0 or not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(True) if _iteration_of(line) <= iteration]


def _iteration_of(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, from a run that was killed


def _summary_writer(directory: Path, start_iteration: int) -> Any:
    # TensorFlow's C++ chatter, where it is installed, would tear the progress bar apart.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from torch.utils.tensorboard import SummaryWriter

    if start_iteration == 0 and directory.is_dir():
        for old in directory.glob("events.out.tfevents.*"):
            old.unlink()
    return SummaryWriter(str(directory), purge_step=start_iteration + 1, flush_secs=10)
