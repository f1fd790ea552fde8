"""What a step did take: each pipeline rank writes its own times down, and one place puts them together.

    train.trace_iterations: 3   ──►   output_dir/trace/rank0.json  rank1.json …     steps 3, 4, 5, on each machine
    measured_timelines(dir)     ──►   one Timeline a step, all ranks                 (of two sites: copy trace/ together)
    measured_problem(dir, config)     a Problem with the measured durations
    write_step_traces(dir)      ──►   dir/trace/step3.json …                         for `ldt draw`

Steps 1 and 2 are warm-up. Of each pipeline rank its first process (tensor and context rank 0, of the first edge
replica) writes. A rank times its computations from the beginning of its own step, by a clock that only runs forward;
the beginning itself is read from the machine's clock. So durations do not depend on clocks that agree; how ranks of
two sites lie relative to each other is as exact as their clocks are synchronised (NTP), and should be read only where
that is well below the link's latency.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats.trace_json import Trace, dumps
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.timeline import Span, Timeline
from ldt_schedules.runtime.recorder import StepRecorder
from ldt_schedules.topology import Place
from ldt_schedules.training.config import TrainConfig, shared_fingerprint
from ldt_schedules.training.cost_model import problem_of

TRACE_DIR = "trace"

_HOW = "train with train.trace_iterations=3 or so, and of a run on two sites copy the trace/ of both into one directory"

_FORMAT = "ldt-rank-trace/1"
_SHAPING_KEYS = ("model.", "vision.", "layers", "sites.", "train.global_batch_size", "train.micro_batch_size")


def trace_writer(config: TrainConfig, place: Place) -> TraceWriter | None:
    """The writer of this process; None where nothing is traced.

    Raises:
        ConfigError: the directory cannot be written.
    """
    first = place.tensor_rank == place.context_rank == config.topology.edge_replica(place) == 0
    return TraceWriter(config, place.pipeline_rank) if first and config.train.traced_iterations else None


class TraceWriter:
    """Keeps the traced steps of one pipeline rank and writes them after the last one, so that no step waits for a disk.

    A file of an earlier run goes at once: a run that fails leaves no trace.
    """

    def __init__(self, config: TrainConfig, rank: int) -> None:
        self._iterations = config.train.traced_iterations
        self._path = _file_of(config.train.output_dir, rank)
        self._content: dict[str, Any] = {
            "format": _FORMAT,
            "rank": rank,
            "num_ranks": config.layout.num_ranks,
            "num_domains": config.topology.domains,
            "laps": 2 if config.has_vision else 1,
            "frozen": [stage.index for stage in config.layout.stages if stage.frozen],
            "num_microbatches": config.num_microbatches,
            "config": _shaping(config),
            "steps": [],
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"train.output_dir {config.train.output_dir} cannot be written: {error.strerror}"
            ) from None

    def step(self, iteration: int, recorder: StepRecorder) -> None:
        """Note the step if it is one to trace."""
        if iteration not in self._iterations:
            return
        self._content["steps"].append(
            {
                "iteration": iteration,
                "started_s": recorder.started_s,
                "step_s": recorder.step_s,
                "waited_s": recorder.waited_s,
                "actions": [[str(action), start, end] for action, start, end in recorder.spans_s()],
            }
        )
        if iteration == self._iterations[-1]:
            self._path.write_text(json.dumps(self._content) + "\n", encoding="utf-8")


def measured_timelines(run_dir: str | Path, config: TrainConfig | None = None) -> list[Timeline]:
    """One timeline for each traced step, in seconds from when the first rank began it; computations only.

    Args:
        config: compared with the one that was traced, as far as it decides what a step does.

    Raises:
        ConfigError: a rank's file is missing or broken, the files are of different runs, or the config is another.
    """
    return list(_timelines(_read_run(run_dir, config)).values())


def measured_problem(run_dir: str | Path, config: TrainConfig) -> Problem:
    """The cost model's problem with measured times: for each stage the median over its microbatches and traced steps.

    Memory, message sizes and the link are the cost model's. A B that was measured as a whole is split into I and W in
    the cost model's proportion.

    Raises:
        ConfigError: as `measured_timelines`, and `problem_of`.
    """
    modelled = problem_of(config)
    stages = range(len(modelled.layout.stages))
    times = _medians(_read_run(run_dir, config))
    missing = [
        s
        for s in stages
        if (Kind.F, s) not in times
        or (modelled.layout.has_backward(s) and not {(Kind.B, s), (Kind.W, s)} & times.keys())
    ]
    if missing:
        raise ConfigError(f"the trace in {run_dir} has no forward or no backward of stages {missing}; {_HOW}")
    costs = modelled.costs

    def backward(stage: int, kind: Kind) -> float:
        if not modelled.layout.has_backward(stage):
            return 0.0
        if (kind, stage) in times:
            return times[kind, stage]
        if kind is Kind.B:
            return times[Kind.I, stage] + times[Kind.W, stage]
        whole = costs.time(Kind.B, stage, 0)
        share = costs.time(kind, stage, 0) / whole if whole else 0.5  # a stage without layers
        return times[Kind.B, stage] * share

    measured = replace(
        costs,
        forward=tuple(times[Kind.F, s] for s in stages),
        backward=tuple(backward(s, Kind.B) for s in stages),
        input_grad=tuple(backward(s, Kind.I) for s in stages),
        weight_grad=tuple(backward(s, Kind.W) for s in stages),
    )
    return replace(modelled, costs=measured)


def write_step_traces(run_dir: str | Path, config: TrainConfig | None = None) -> list[Path]:
    """Write each traced step, all ranks together, as `trace/step{iteration}.json` (`ldt-trace/1`).

    Raises:
        ConfigError: as `measured_timelines`, or the directory cannot be written.
    """
    ranks = _read_run(run_dir, config)
    written = []
    try:
        for iteration, timeline in _timelines(ranks).items():
            path = Path(run_dir) / TRACE_DIR / f"step{iteration}.json"
            trace = Trace(ranks[0].layout, ranks[0].num_microbatches, timeline)
            path.write_text(dumps(trace), encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise ConfigError(f"{Path(run_dir) / TRACE_DIR} cannot be written: {error.strerror}") from None
    return written


@dataclass(frozen=True)
class _Step:
    """One step of one rank; `actions` in seconds from `started_s`, which is on the machine's clock."""

    started_s: float
    actions: tuple[tuple[Action, float, float], ...]


@dataclass(frozen=True)
class _RankTrace:
    """A rank's file: step number -> what it did."""

    num_ranks: int
    num_domains: int
    num_microbatches: int
    config: dict[str, Any]
    steps: dict[int, _Step]
    laps: int
    frozen: tuple[int, ...]

    @property
    def layout(self) -> Layout:
        places = 1 + (self.num_ranks - 1) // self.num_domains
        if self.laps == 1:
            return Layout.u(places, self.num_domains)
        return Layout.laps(places, self.laps, self.num_domains).freeze(self.frozen)


def _timelines(ranks: list[_RankTrace]) -> dict[int, Timeline]:
    timelines = {}
    for iteration in sorted(set.intersection(*(set(rank.steps) for rank in ranks))):
        steps = [rank.steps[iteration] for rank in ranks]
        first = min(step.started_s for step in steps)
        spans = [
            Span(rank, action, step.started_s - first + start, step.started_s - first + end)
            for rank, step in enumerate(steps)
            for action, start, end in step.actions
        ]
        timelines[iteration] = Timeline(len(ranks), tuple(sorted(spans, key=lambda span: span.end)))
    return timelines


def _medians(ranks: list[_RankTrace]) -> dict[tuple[Kind, int], float]:
    """Seconds of one microbatch."""
    seconds: Mapping[tuple[Kind, int], list[float]] = defaultdict(list)
    for rank in ranks:
        for step in rank.steps.values():
            for action, start, end in step.actions:
                seconds[action.kind, action.stage].append((end - start) / len(action.microbatches))
    return {key: median(values) for key, values in seconds.items()}


def _read_run(run_dir: str | Path, config: TrainConfig | None) -> list[_RankTrace]:
    """Every rank's file, checked against each other and the config."""
    directory = Path(run_dir) / TRACE_DIR
    there = sorted(directory.glob("rank*.json"))
    if not there:
        raise ConfigError(f"{directory} holds no trace (rank0.json, rank1.json, …); {_HOW}")
    num_ranks = _read_rank(there[0]).num_ranks
    missing = [rank for rank in range(num_ranks) if not _file_of(run_dir, rank).is_file()]
    if missing:
        raise ConfigError(f"{directory} lacks the trace of pipeline ranks {missing} of {num_ranks}; {_HOW}")
    ranks = [_read_rank(_file_of(run_dir, rank)) for rank in range(num_ranks)]
    for number, rank in enumerate(ranks[1:], 1):
        if rank.config != ranks[0].config or rank.steps.keys() != ranks[0].steps.keys():
            raise ConfigError(f"{directory}: rank{number}.json is of another run than rank0.json; {_HOW}")
    traced, given = ranks[0].config, ranks[0].config if config is None else _shaping(config)
    if traced != given:
        lines = [
            f"{key}: traced {traced.get(key)}, given {given[key]}" for key in given if traced.get(key) != given[key]
        ]
        raise ConfigError(f"the trace in {directory} is of another config:\n  " + "\n  ".join(lines))
    return ranks


def _read_rank(path: Path) -> _RankTrace:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ConfigError(f"{path} is no trace of a rank: its format is {content['format']!r}, not {_FORMAT!r}")
        steps = {
            int(step["iteration"]): _Step(
                float(step["started_s"]),
                tuple((Action.parse(text), float(start), float(end)) for text, start, end in step["actions"]),
            )
            for step in content["steps"]
        }
        if not steps:
            raise ValueError("it has no step")
        numbers = (int(content[key]) for key in ("num_ranks", "num_domains", "num_microbatches"))
        # Traces of models of text did not say these two.
        laps, frozen = int(content.get("laps", 1)), tuple(int(stage) for stage in content.get("frozen", ()))
        return _RankTrace(*numbers, content["config"], steps, laps, frozen)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, ScheduleError) as error:
        raise ConfigError(f"{path} is broken ({type(error).__name__}: {error}); {_HOW}") from None


def _shaping(config: TrainConfig) -> dict[str, Any]:
    """What decides the actions of a step and their sizes."""
    return {key: value for key, value in shared_fingerprint(config).items() if key.startswith(_SHAPING_KEYS)}


def _file_of(run_dir: str | Path, rank: int) -> Path:
    return Path(run_dir) / TRACE_DIR / f"rank{rank}.json"
