"""A run that failed, put together from the files that its processes left: who began it, and how far each rank was.

    found = read_post_mortem(directory)
    found.cause.text             # "edge rank 0, step 3, action 4 `F s0 m1`: ValueError: …"
    found.rows[1].states         # of each action of pipeline rank 1 in that step

A process that was killed, or whose machine is gone, leaves no file: it is named as far as the others' files tell that it
was there. Of several processes that hold one pipeline rank the one that came least far is the row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.reached import Reached, State
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.flight_file import DamagedFile, FlightCause, FlightFile, read_flight_file

_NAME = re.compile(r"(edge|cloud)-rank(\d+)\.json")


@dataclass(frozen=True)
class Damaged:
    """A file that could not be used, and the process it is of where its name tells."""

    name: str
    reason: str
    process: str | None


@dataclass(frozen=True)
class PostMortem:
    """What is known of the failure.

    Attributes:
        cause: None where no process had heard of one.
        other_causes: what other processes said instead.
        step: the one that is shown, the cause's; None where no process was in one.
        table: of that step.
        rows: of each pipeline rank; empty without a table.
        flights: by site and rank.
        num_processes: of the run; None where no file could be read.
        missing: names of processes without a file, as far as they can be named; `num_missing` counts all.
    """

    cause: FlightCause | None
    other_causes: tuple[str, ...]
    step: int | None
    table: ScheduleTable | None
    rows: tuple[Reached, ...]
    flights: tuple[FlightFile, ...]
    damaged: tuple[Damaged, ...]
    num_processes: int | None
    missing: tuple[str, ...]
    num_missing: int


def read_post_mortem(directory: Path) -> PostMortem:
    """Put the files of a directory together.

    Raises:
        ConfigError: no such directory, or no flight file in it.
    """
    if not directory.is_dir():
        raise ConfigError(
            f"{directory} is no directory; give the one that holds the processes' files (edge-rank0.json, cloud-rank0.json, "
            "…), which a failing run names"
        )
    paths = sorted(directory.glob("*.json"))
    if not paths:
        raise ConfigError(
            f"{directory} holds no flight files (edge-rank0.json, cloud-rank0.json, …); is it another directory?"
        )
    flights, damaged = [], []
    for path in paths:
        try:
            flights.append(read_flight_file(path))
        except DamagedFile as error:
            damaged.append(Damaged(path.name, str(error), _process_of(path.name)))
    return put_together(flights, damaged)


def put_together(flights: Sequence[FlightFile], damaged: Sequence[Damaged] = ()) -> PostMortem:
    """The same from what was read."""
    ordered = sorted(flights, key=lambda one: (one.site == "cloud", one.site_rank))
    cause, others = _cause(ordered)
    step = _step(ordered, cause)
    table = _table(ordered, step)
    rows = () if table is None or step is None else tuple(
        _row(table, rank, [one for one in ordered if one.pipeline_rank == rank], step, cause)
        for rank in range(len(table.ranks))
    )  # fmt: skip
    num_processes = max((one.processes for one in ordered), default=None)
    missing, num_missing = _missing(ordered, damaged, table, num_processes)
    return PostMortem(
        cause, others, step, table, rows, tuple(ordered), tuple(damaged), num_processes, missing, num_missing
    )


def _cause(flights: Sequence[FlightFile]) -> tuple[FlightCause | None, tuple[str, ...]]:
    """What the process that failed says counts before what others heard, an earlier word before a later."""
    said = sorted((one for one in flights if one.cause), key=lambda one: (not one.own_failure, one.written_unix_s))
    causes = [one.cause for one in said if one.cause is not None]
    if not causes:
        return None, ()
    return causes[0], tuple(dict.fromkeys(one.text for one in causes if one.text != causes[0].text))


def _step(flights: Sequence[FlightFile], cause: FlightCause | None) -> int | None:
    if cause is not None and cause.step is not None and cause.step >= 0:
        return cause.step
    return min((one.step for one in flights if one.step >= 0), default=None)


def _table(flights: Sequence[FlightFile], step: int | None) -> ScheduleTable | None:
    """Of a process in that step, else of any: steps of one run mostly have one table."""
    with_table = [one for one in flights if one.table is not None]
    if not with_table:
        return None
    return min(with_table, key=lambda one: one.step != step).schedule()


def _row(
    table: ScheduleTable, rank: int, flights: Sequence[FlightFile], step: int, cause: FlightCause | None
) -> Reached:
    row = table.ranks[rank]
    reached = [_reached(one, row, step, cause) for one in flights]
    # The one that failed, else the one that came least far.
    return min(
        reached, key=lambda one: (one.at is None or one.state is not State.FAILED, one.done), default=Reached(row, None)
    )


def _reached(flight: FlightFile, row: tuple[Action, ...], step: int, cause: FlightCause | None) -> Reached:
    if flight.step != step:
        return Reached(row, len(row) if flight.step > step else 0)
    done = min(flight.done, len(row))
    is_culprit = flight.own_failure or (cause is not None and cause.process == flight.process)
    if is_culprit and cause is not None and cause.index is not None and cause.index < len(row):
        return Reached(row, done, cause.index, State.FAILED)
    now = flight.now
    if now is None or now.index is None or now.index >= len(row):
        return Reached(row, done)
    return Reached(row, done, now.index, State.WAITING if now.waits_for is not None else State.RUNNING)


def _missing(
    flights: Sequence[FlightFile], damaged: Sequence[Damaged], table: ScheduleTable | None, num_processes: int | None
) -> tuple[tuple[str, ...], int]:
    """Names as far as they follow: ranks below one that is there, and all where each pipeline rank is one process."""
    here = {one.process for one in flights} | {one.process for one in damaged if one.process is not None}
    num_missing = max(0, (num_processes or 0) - len(here))
    if not num_missing:
        return (), 0
    if table is not None and len(table.ranks) == num_processes:
        expected = ["edge rank 0", *(f"cloud rank {rank}" for rank in range(num_processes - 1))]
    else:
        ranks = {"edge": -1, "cloud": -1}
        for one in flights:
            ranks[one.site] = max(ranks[one.site], one.site_rank)
        expected = [f"{site} rank {rank}" for site, last in ranks.items() for rank in range(last)]
        expected += [f"{site} rank 0" for site, last in ranks.items() if last < 0]
    named = tuple(name for name in expected if name not in here)
    return named[:num_missing], num_missing


def _process_of(name: str) -> str | None:
    """`edge-rank0.json` -> `edge rank 0`."""
    match = _NAME.fullmatch(name)
    return None if match is None else f"{match[1]} rank {match[2]}"
