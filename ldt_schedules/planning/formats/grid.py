"""The grid: what people paste into bug reports. One column a rank, one row an action of each.

             Rank 0            Rank 1
    Step 00: 0,0,F,0,          1,1,RECV_F,(0,),0
    Step 01: 0,0,SEND_F,(0,),1 1,1,F,0,

A cell is `stage,rank,ACTION,microbatch,` or `stage,rank,SEND_F,(microbatches),peer`. A step is a rank's program counter,
not a clock: two cells in one row need not happen together.
"""

from __future__ import annotations

import re

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.table import ScheduleTable

_CELL = re.compile(
    r"(?P<stage>\d{1,9}),(?P<rank>\d{1,9}),(?P<kind>[A-Z_]+),"
    r"(?:(?P<one>\d{1,9})|\((?P<many>\d{1,9}(?:,\s*\d{1,9})*),?\)),(?P<peer>\d{0,9})"
)
_HEADER = re.compile(r"Rank (\d{1,9})\b")
_STEP = re.compile(r"Step (\d+):")


def dumps(table: ScheduleTable) -> str:
    """The table as a grid; ranks that are done leave their cells empty.

    Raises:
        ScheduleError: an action must name the stage at the other end, for which a cell has no place.
    """
    for rank, row in enumerate(table.ranks):
        for action in row:
            if action.other is not None:
                raise ScheduleError(f"rank {rank}: a cell of a grid has no place for {action}; write JSON instead")
    columns = [[_cell(rank, action) for action in row] for rank, row in enumerate(table.ranks)]
    widths = [max([len(f"Rank {rank}"), *map(len, column)]) for rank, column in enumerate(columns)]
    label = len("Step 00: ")
    lines = [" " * label + " ".join(f"Rank {rank}".ljust(width) for rank, width in enumerate(widths))]
    for step in range(max(map(len, columns))):
        cells = [
            (column[step] if step < len(column) else "").ljust(width)
            for column, width in zip(columns, widths, strict=True)
        ]
        lines.append(f"Step {step:02d}:".ljust(label) + " ".join(cells))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def loads(text: str, layout: Layout | None = None) -> ScheduleTable:
    """Read a grid.

    Args:
        layout: what the stages are; by default a U, found from the number of columns.

    Raises:
        ScheduleError: not a grid, a cell that cannot be read, in a wrong column, or without the peer it needs. A stage
            that stands on several ranks at once (several roots) is not supported.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or not _HEADER.search(lines[0]):
        raise ScheduleError("line 1: expected the ranks' names: 'Rank 0   Rank 1   …'")
    starts = {int(match[1]): match.start() for match in _HEADER.finditer(lines[0])}
    if sorted(starts) != list(range(len(starts))):
        raise ScheduleError(f"line 1: ranks must be 0..{len(starts) - 1}, got {sorted(starts)}")
    rows: list[list[Action]] = [[] for _ in starts]
    stages: dict[int, set[int]] = {}
    for number, line in enumerate(lines[1:], 2):
        step = _STEP.match(line)
        if step is None:
            raise ScheduleError(f"line {number}: expected 'Step NN: …', got {line[:30]!r}")
        for cell in line[step.end() :].split():
            rank, action = _action(cell, number, len(starts))
            rows[rank].append(action)
            stages.setdefault(action.stage, set()).add(rank)
    _refuse_several_roots(stages)
    layout = layout or Layout.u(len(starts))
    forward_only = all(action.kind.is_forward for row in rows for action in row)
    microbatches = {m for row in rows for action in row for m in action.microbatches}
    return ScheduleTable.from_rows(layout, max(microbatches, default=-1) + 1, rows, forward_only)


def _cell(rank: int, action: Action) -> str:
    if action.kind.is_compute and len(action.microbatches) == 1:
        return f"{action.stage},{rank},{action.kind},{action.microbatches[0]},"
    many = ",".join(map(str, action.microbatches)) + ("," if len(action.microbatches) == 1 else "")
    return f"{action.stage},{rank},{action.kind},({many}),{'' if action.peer is None else action.peer}"


def _action(cell: str, line: int, num_ranks: int) -> tuple[int, Action]:
    match = _CELL.fullmatch(cell)
    if match is None or match["kind"] not in Kind.__members__:
        raise ScheduleError(
            f"line {line}: cannot read the cell {cell!r}; expected for example '0,0,F,0,' or '0,0,SEND_F,(0,),1'"
        )
    rank = int(match["rank"])
    if rank >= num_ranks:
        raise ScheduleError(f"line {line}: the cell {cell!r} is of rank {rank}, the grid has {num_ranks} columns")
    microbatches = tuple(int(m) for m in (match["one"] or match["many"]).split(","))
    try:
        peer = int(match["peer"]) if match["peer"] else None
        return rank, Action(Kind(match["kind"]), int(match["stage"]), microbatches, peer)
    except ScheduleError as error:
        raise ScheduleError(f"line {line}: the cell {cell!r}: {error}") from None


def _refuse_several_roots(stages: dict[int, set[int]]) -> None:
    for stage, ranks in sorted(stages.items()):
        if len(ranks) > 1:
            raise ScheduleError(
                f"stage {stage} stands on ranks {sorted(ranks)}: several roots of one stage are not supported yet; give "
                "each a stage number of its own"
            )
