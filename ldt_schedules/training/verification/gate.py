"""Starts the runs of a verification on this machine, and compares what they recorded.

reference/    the model in one process, once
split/        the run over both sites, all its processes; with a planted error  split-NAME/
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.launcher import run_all
from ldt_schedules.training.local_run import LOG_DIR, processes
from ldt_schedules.training.verification.comparison import compare
from ldt_schedules.training.verification.configs import whole_config
from ldt_schedules.training.verification.planted import PLANTED, Planted
from ldt_schedules.training.verification.report import Report, when
from ldt_schedules.training.verification.tolerances import Tolerances

REFERENCE, SPLIT = "reference", "split"

# CUDA's matrix products are deterministic only with a workspace of this form; it is read when CUDA starts.
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@dataclass(frozen=True)
class PlantedResult:
    """What became of a planted error.

    Attributes:
        not_for: why it was not tried; the rest is empty then.
        caught: would the gate have failed?
        named: does a finding say what it is?
        says: a summary of the finding that names it, else of the first.
    """

    planted: Planted
    not_for: str | None
    caught: bool = False
    named: bool = False
    says: str = ""

    @property
    def passed(self) -> bool:
        return self.not_for is not None or (self.caught and self.named)


@dataclass
class Gate:
    """One verification.

    Attributes:
        command: `ldt` is called with it in each process: verb, config, overrides, steps.
        config: of the split run, from `configs.split_config`; `link.port` 0.
        directory: of all records.
        console: where progress is shown.
        keep: leave the records of every run; without it those of planted errors are removed when they were compared.
    """

    command: Sequence[str]
    config: TrainConfig
    steps: int
    tolerances: Tolerances
    directory: Path
    console: Console
    keep: bool = False
    _reference: Path | None = field(default=None, init=False)

    def compare(self, plant: str | None = None) -> Report:
        """Run the reference, unless it was run before, and the split run, and compare.

        Raises:
            ChildFailed, Stopped: see `launcher.run_all`.
        """
        if self._reference is None:
            self._reference = self._run(REFERENCE, "one process", whole_config(self.config), ["--one-process"])
        title = "both sites" if plant is None else f"both sites, {plant}"
        name = SPLIT if plant is None else f"{SPLIT}-{plant}"
        mine = self._run(name, title, self.config, [] if plant is None else ["--plant", plant])
        adaptive = self.config.train.optimizer == "adam"
        report = compare(mine, self._reference, self.steps, self.tolerances, self.config.model.precision, adaptive)
        if plant is not None and not self.keep:
            shutil.rmtree(mine)
        return report

    def try_planted(self) -> Iterator[PlantedResult]:
        """Each planted error in turn.

        Raises:
            ChildFailed, Stopped: see `launcher.run_all`.
        """
        for planted in PLANTED.values():
            reason = planted.not_for(self.config)
            if reason is not None:
                yield PlantedResult(planted, reason)
            else:
                yield judge(planted, self.config, self.compare(planted.name))

    def _run(self, name: str, title: str, config: TrainConfig, options: list[str]) -> Path:
        directory = self.directory / name
        command = [*self.command, "--record", str(directory), *options]
        started = processes(config, command, _DETERMINISTIC)
        who = title if len(started) == 1 else f"{title} ({len(started)} processes)"
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        self.console.print(f"{who}: {steps}…", highlight=False, markup=False, soft_wrap=True)
        # The first process shows how far it is: threads of ours would be in the way of starting processes.
        run_all([replace(started[0], owns_terminal=True), *started[1:]], directory / LOG_DIR)
        return directory


def judge(planted: Planted, config: TrainConfig, report: Report) -> PlantedResult:
    """Was the error caught, and called what it is?"""
    expected = planted.expected(config)
    naming = [
        finding
        for finding in report.findings
        if (finding.kind, finding.site) == (expected.kind, str(expected.site))
        and finding.cause.startswith(expected.cause)
    ]
    says = next((f"{when(finding.step)}: {finding.summary}" for finding in [*naming, *report.findings]), "")
    return PlantedResult(planted, None, caught=not report.passed, named=bool(naming), says=says)
