"""A fault at every place of a step, in every process: what happens then, and what a resumed run makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldt_schedules.comm.process_files import file_stem
from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.schedule import table_source
from tests.faults.injection import Fault
from tests.faults.worlds import Ended, resume_all, run_until_ended, saved_weights
from tests.helpers.workers import Workers, site_ports
from tests.training.checkpoint_runs import tiny

STEP = 1
"""Of three, counted from 0: there is a checkpoint before it and a step after it."""

_SMALL = (
    "train.iterations=3",
    "train.save_interval=1",
    "train.global_batch_size=8",
    "train.log_interval=1000",
    "link.silence_s=2.5",
)
Place = tuple["int | None", "str | None"]
"""Index of an action of the row, or what is begun or waited for outside of it."""

Weights = dict[str, np.ndarray]
Row = Callable[[str, object], None]

PROCESSES = ("edge rank 0", "cloud rank 0", "cloud rank 1")
PHASES = (
    "reducing gradients",
    "who is ready for the step",
    "gradient norms",
    "applying the step",
    "saving a checkpoint",
)
_HEADER = f"the edge's header of step {STEP}"


def small(output: Path, *overrides: str) -> TrainConfig:
    """Edge and two cloud ranks, four microbatches, Adam, a checkpoint after every step."""
    return tiny(output, *_SMALL, *overrides)


@dataclass
class Found:
    """Of many faults.

    Attributes:
        stopped_s: of each, how long after it the last of the other processes was gone.
        problems: one line each; there should be none.
    """

    faults: int = 0
    stopped_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def require(self, name: str, record_property: Row) -> None:
        """Put a row into the table at the end of the tests; there may be no problem."""
        row = {
            "fault": name,
            "faults": self.faults,
            "median_s": float(np.median(self.stopped_s)) if self.stopped_s else 0.0,
            "slowest_s": max(self.stopped_s, default=0.0),
            "problems": len(self.problems),
        }
        record_property("faults", row)
        assert not self.problems, "\n".join(self.problems)


def places(process: str) -> Iterator[Place]:
    """Every action of a process's row, and every other thing that it does in a step."""
    config = small(Path("."))
    table = table_source(config)(config.num_microbatches, False)
    for index in range(len(table.ranks[PROCESSES.index(process)])):
        yield index, None
    for phase in (*PHASES, *((_HEADER,) if process.startswith("cloud") else ())):
        yield None, phase


def reference(folder: Path) -> Weights:
    """Weights of a run without a fault."""
    folder.mkdir()
    ended = run_until_ended(small(folder), folder)
    assert [one.code for one in ended] == [0, 0, 0], ended
    return saved_weights(folder)


def break_at(
    workers: Workers,
    folder: Path,
    process: str,
    how: str,
    chosen: Sequence[Place],
    expected: Weights,
    within_s: float,
) -> Found:
    """One run for each place, each with one fault; then all of them resumed."""
    found, configs = Found(), []
    for number, (index, phase) in enumerate(chosen):
        own = folder / str(number)
        own.mkdir(parents=True)
        fault = Fault(how, process, STEP, index, phase, own / "at")
        ended = run_until_ended(small(own), own, fault)
        name = f"{how} {process} at {phase or f'action {index}'}"
        found.problems += [f"{name}: {problem}" for problem in _problems(own, fault, ended, within_s)]
        found.stopped_s.append(max(one.after_s for one in ended if one.name != process))
        found.faults += 1
        configs.append(small(own, "train.resume=auto"))
    for name, problem in _resumed(workers, configs, expected):
        found.problems.append(f"{how} {process}, resumed {name}: {problem}")
    return found


def _problems(folder: Path, fault: Fault, ended: list[Ended], within_s: float) -> Iterator[str]:
    """What is wrong with how the processes ended."""
    if not fault.at.exists():
        yield "the fault did not happen"
    for one in ended:
        if one.code is None:
            yield f"{one.name} hung"
        elif one.code == 0:
            yield f"{one.name} ended as if nothing had happened"
        if one.name != fault.process:
            if one.after_s > within_s:
                yield f"{one.name} stopped after {one.after_s:.2f} s"
            if f"because {fault.process}" not in one.said and f"heard of {fault.process}" not in one.said:
                yield f"{one.name} does not name the culprit: {one.said[-600:]}"
            yield from _half_applied(folder, fault, one)


def _half_applied(folder: Path, fault: Fault, one: Ended) -> Iterator[str]:
    """Nobody has changed a weight in a step that somebody did not come to apply."""
    path = folder / "flight" / f"{file_stem(one.name)}.json"
    if not path.exists():
        yield f"{one.name} wrote no flight recorder"
        return
    applied = json.loads(path.read_text())["steps_applied"]
    allowed = {STEP, STEP + 1} if fault.phase in ("applying the step", "saving a checkpoint") else {STEP}
    if applied not in allowed:
        yield f"{one.name} had applied {applied} steps"


def _resumed(workers: Workers, configs: list[TrainConfig], expected: Weights) -> Iterator[tuple[str, str]]:
    """The runs taken up again: every weight must be, bit for bit, that of the run without a fault."""
    ports = site_ports()
    ranks = [(site, rank) for site in Site for rank in range(configs[0].site_processes(site))]
    got = workers.run(resume_all, [(configs, str(site), rank, ports) for site, rank in ranks], timeout_s=200)
    for number, config in enumerate(configs):
        weights = {
            f"{site}{rank} {name}": array
            for (site, rank), runs in zip(ranks, got, strict=True)
            for name, array in runs[number].items()
        }
        if set(weights) != set(expected):
            yield Path(config.train.output_dir).name, "other weights"
        wrong = [name for name in expected if name in weights and not np.array_equal(weights[name], expected[name])]
        if wrong:
            yield Path(config.train.output_dir).name, f"{len(wrong)} weights differ, {wrong[0]} the first"
