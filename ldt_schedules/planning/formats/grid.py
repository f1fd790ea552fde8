"""The grid: what people paste into bug reports. One column a rank, one row an action of each.

             Rank 0            Rank 1
    Step 00: 0,0,F,0,          1,1,RECV_F,(0,),0
    Step 01: 0,0,SEND_F,(0,),1 1,1,F,0,

A cell is `stage,rank,ACTION,microbatch,` or `stage,rank,SEND_F,(microbatches),peer`. A step is a rank's program counter,
not a clock: two cells in one row need not happen together. The stage number is the author's (`Stage.label`):
stages on different ranks may share one, as several roots do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats import frozen, grid_layout
from ldt_schedules.planning.formats.grid_layout import Cell
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.table import ScheduleTable

_CELL = re.compile(
    r"(?P<stage>\d{1,9}),(?P<rank>\d{1,9}),(?P<kind>[A-Z_]+),"
    r"(?:(?P<one>\d{1,9})|\((?P<many>\d{1,9}(?:,\s*\d{1,9})*),?\)),(?P<peer>\d{0,9})"
)
_HEADER = re.compile(r"Rank (\d{1,9})\b")
_STEP = re.compile(r"Step (\d+):")
_WORD = re.compile(r"(?:\([^()]*\)|\S)+")
"""A cell; Python writes a blank into `(0, 1)`."""


def dumps(table: ScheduleTable) -> str:
    """The table as a grid; ranks that are done leave their cells empty.

    Raises:
        ScheduleError: an action must name the stage at the other end, for which a cell has no place; a stage is frozen
            and nothing in a grid would show it.
    """
    frozen.check_can_be_seen(table)
    for rank, row in enumerate(table.ranks):
        for action in row:
            if action.other is not None:
                raise ScheduleError(f"rank {rank}: a cell of a grid has no place for {action}; write JSON instead")
    columns = [[cell(table, rank, index) for index in range(len(row))] for rank, row in enumerate(table.ranks)]
    return "\n".join(_lines(columns, range(max(map(len, columns))))) + "\n"


def cell(table: ScheduleTable, rank: int, index: int) -> str:
    """The cell of action `index` of a rank, `0,1,F,0,`; of an action that a grid has no place for, its own text."""
    action, stages = table.ranks[rank][index], table.layout.stages
    if action.other is not None:
        return str(action)
    number = stages[action.stage].number if action.stage < len(stages) else action.stage
    if action.kind.is_compute and len(action.microbatches) == 1:
        return f"{number},{rank},{action.kind},{action.microbatches[0]},"
    many = ",".join(map(str, action.microbatches)) + ("," if len(action.microbatches) == 1 else "")
    return f"{number},{rank},{action.kind},({many}),{'' if action.peer is None else action.peer}"


def excerpt(table: ScheduleTable, rank: int, index: int, rows: int = 3) -> str:
    """The steps around action `index` of a rank, that one marked: for a message about what went wrong there.

                 Rank 0            Rank 1
        Step 01: 0,0,SEND_F,(0,),1 >1,1,F,0,<
        Step 02: 0,0,F,1,          1,1,B,0,

    An index past the end of the row marks the empty place there: the rank is through. Any table can be shown.

    Args:
        rows: how many steps before and after it.
    """
    end = max(index + 1, *map(len, table.ranks))
    steps = range(max(0, index - rows), min(end, index + rows + 1))
    columns = [[cell(table, r, step) if step < len(row) else "" for step in steps] for r, row in enumerate(table.ranks)]
    if index in steps:
        columns[rank][index - steps.start] = f">{columns[rank][index - steps.start]}<"
    return "\n".join(_lines(columns, steps))


def loads(text: str, layout: Layout | None = None) -> ScheduleTable:
    """Read a grid.

    Args:
        layout: what the stages are. By default a U of one lap or several if the numbers and ranks in the cells are those
            of one; any other graph of stages is read off the messages (`grid_layout` says how). Stages without a
            backward are frozen (`frozen`).

    Raises:
        ScheduleError: not a grid, a cell that cannot be read, of a rank without a column, without the peer it needs, or
            with one that holds no stage at the other end; or a graph of stages that the messages do not show in full.
            What is wrong with a U that no `layout` was given for, the validator tells, all at once.
    """
    num_ranks, cells = _read(text)
    found = layout or grid_layout.known_layout(cells, num_ranks) or grid_layout.derived_layout(cells, num_ranks)
    known = grid_layout.places(found)
    rows: list[list[Action]] = [[] for _ in range(num_ranks)]
    for one in cells:
        action = one.action
        stage = grid_layout.stage_of(one, known)
        rows[one.rank].append(Action(action.kind, stage, action.microbatches, action.peer))
    if layout is None:
        found = frozen.as_seen(found, rows)
    else:
        grid_layout.check_peers(cells, layout)
    forward_only = all(one.action.kind.is_forward for one in cells)
    last = max((m for one in cells for m in one.action.microbatches), default=-1)
    return ScheduleTable.from_rows(found, last + 1, rows, forward_only)


def _lines(columns: Sequence[Sequence[str]], steps: Iterable[int]) -> list[str]:
    """A grid of these cells; `columns` has for each rank those of the steps, as far as there are any."""
    widths = [max([len(f"Rank {rank}"), *map(len, column)]) for rank, column in enumerate(columns)]
    label = len("Step 00: ")
    lines = [" " * label + " ".join(f"Rank {rank}".ljust(width) for rank, width in enumerate(widths))]
    for row, step in enumerate(steps):
        cells = [
            (column[row] if row < len(column) else "").ljust(width)
            for column, width in zip(columns, widths, strict=True)
        ]
        lines.append(f"Step {step:02d}:".ljust(label) + " ".join(cells))
    return [line.rstrip() for line in lines]


def _read(text: str) -> tuple[int, list[Cell]]:
    """How many columns there are, and the cells, row by row."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines or not _HEADER.search(lines[0][1]):
        raise ScheduleError("line 1: expected the ranks' names: 'Rank 0   Rank 1   …'")
    ranks = sorted(int(match[1]) for match in _HEADER.finditer(lines[0][1]))
    if ranks != list(range(len(ranks))):
        raise ScheduleError(f"line {lines[0][0]}: ranks must be 0..{len(ranks) - 1}, got {ranks}")
    cells = []
    for number, line in lines[1:]:
        step = _STEP.match(line)
        if step is None:
            raise ScheduleError(f"line {number}: expected 'Step NN: …', got {line[:30]!r}")
        cells += [_cell(word, number, len(ranks)) for word in _WORD.findall(line[step.end() :])]
    return len(ranks), cells


def _cell(text: str, line: int, num_ranks: int) -> Cell:
    match = _CELL.fullmatch(text)
    if match is None or match["kind"] not in Kind.__members__:
        raise ScheduleError(
            f"line {line}: cannot read the cell {text!r}; expected for example '0,0,F,0,' or '0,0,SEND_F,(0,),1'"
        )
    stage, rank, kind = int(match["stage"]), int(match["rank"]), Kind(match["kind"])
    if rank >= num_ranks:
        raise ScheduleError(f"line {line}: the cell {text!r} is of rank {rank}, the grid has {num_ranks} columns")
    if not kind.is_compute and not match["peer"]:
        raise ScheduleError(
            f"line {line}: the cell {text!r} names no peer; write the rank {'to' if kind.is_send else 'from'} which "
            f"the message {'goes' if kind.is_send else 'comes'} behind the last comma"
        )
    microbatches = tuple(int(m) for m in (match["one"] or match["many"]).split(","))
    try:
        return Cell(line, text, rank, Action(kind, stage, microbatches, int(match["peer"]) if match["peer"] else None))
    except ScheduleError as error:
        raise ScheduleError(f"line {line}: the cell {text!r}: {error}") from None
