"""The CSV of torch.distributed.pipelining: one line a rank, one cell an action.

    0F0,0SEND_F0,2RECV_F0,2F0,2B0,2SEND_B0,0RECV_B0,0B0
    1RECV_F0,1F0,1SEND_F0,1RECV_B0,1B0,1SEND_B0

The grammar is that of `_Action` and `_load_csv` in torch/distributed/pipelining/schedules.py (torch 2.13): stage, action,
microbatch; B the full backward, I and W the gradients of the input and of the weights. An empty cell is a bubble, an empty
line a rank with nothing to do. The stage of a SEND or RECV is the acting rank's.

Peers are not written. torch takes stage s to be fed by stage s - 1, each stage on one rank, and so do we: another layout
is refused. Nor is the layout: by default it is a U over as many ranks as there are lines.

UNSHARD, RESHARD and REDUCE_GRAD handle sharded parameters within a rank; they are no part of a table and are left out. A
`compute_only` file has no SEND and RECV; `lowering` can put them into its `compute_order`.
"""

from __future__ import annotations

import csv
import io
import re

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats import frozen
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.table import ScheduleTable

_ACTION = "SEND_F|RECV_F|SEND_B|RECV_B|F|B|I|W"
_CELL = re.compile(rf"(?P<stage>[0-9]{{1,9}})(?P<kind>{_ACTION})(?P<microbatch>[0-9]{{1,9}})")
_OF_PARAMETERS = re.compile(r"[0-9]{1,9}(UNSHARD|RESHARD|REDUCE_GRAD)[0-9]{0,9}")
_BEGINNING = re.compile(rf"[\s,\"]*[0-9]+({_ACTION}|UNSHARD|RESHARD|REDUCE_GRAD)[0-9]*[\s,\"]*([,\r\n]|$)")


def is_csv(text: str) -> bool:
    """Does the text begin as this format does?"""
    return _BEGINNING.match(text) is not None


def dumps(table: ScheduleTable) -> str:
    """The table as CSV.

    Raises:
        ScheduleError: the format cannot express it; the message says what and where.
    """
    _check_layout(table.layout)
    frozen.check_can_be_seen(table)
    lines = []
    for rank, row in enumerate(table.ranks):
        cells = []
        for index, action in enumerate(row):
            try:
                cells.append(_cell(table.layout, action))
            except ScheduleError as error:
                raise ScheduleError(f"rank {rank}, action {index} ({action}): {error}") from None
        lines.append(",".join(cells) + "\n")
    return "".join(lines)


def loads(text: str, layout: Layout | None = None) -> ScheduleTable:
    """Read CSV.

    Args:
        layout: what the stages are; by default a U, found from the number of lines, in which stages without a backward
            are frozen (`frozen`).

    Raises:
        ScheduleError: not CSV, a cell that cannot be read or is of another rank, a layout in which peers would be
            ambiguous.
    """
    try:
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ScheduleError(f"this is no CSV: {error}") from None
    if not any(cell.strip() for line in lines for cell in line):
        raise ScheduleError("there is no action; expected one line a rank, for example '0F0,0SEND_F0,…'")
    given, layout = layout, layout or Layout.u(len(lines))
    _check_layout(layout)
    rows: list[list[Action]] = []
    for rank, line in enumerate(lines):
        rows.append([])
        for number, cell in enumerate(line, 1):
            if not cell.strip() or _OF_PARAMETERS.fullmatch(cell.strip()):
                continue
            try:
                rows[rank].append(_action(layout, rank, cell.strip()))
            except ScheduleError as error:
                raise ScheduleError(f"line {rank + 1}, cell {number} ({cell.strip()[:30]!r}): {error}") from None
    if given is None:
        layout = frozen.as_seen(layout, rows)
    forward_only = all(action.kind.is_forward for row in rows for action in row)
    microbatches = {m for row in rows for action in row for m in action.microbatches}
    return ScheduleTable.from_rows(layout, max(microbatches, default=-1) + 1, rows, forward_only)


def _check_layout(layout: Layout) -> None:
    """Raises ScheduleError where stage and microbatch do not say who the peer is."""
    for stage in layout.stages:
        if len(stage.ranks) > 1:
            raise ScheduleError(
                f"stage {stage.index} stands on ranks {', '.join(map(str, stage.ranks))}, one for each domain; in the CSV "
                "of torch every stage stands on one rank"
            )
        if stage.inputs != ((stage.index - 1,) if stage.index else ()):
            sources = " and ".join(map(str, stage.inputs)) or "no other stage"
            raise ScheduleError(
                f"stage {stage.index} reads from {sources}; in the CSV of torch, which names no peers, stage s reads from "
                "stage s - 1"
            )


def _cell(layout: Layout, action: Action) -> str:
    if len(action.microbatches) > 1:
        raise ScheduleError("the CSV of torch has one microbatch in an action, this one is packed")
    if action.other is not None:
        raise ScheduleError(f"the CSV of torch cannot say that the other end is stage {action.other}")
    if action.peer is not None:
        expected = _peer(layout, action.kind, action.stage)
        if action.peer != expected:
            raise ScheduleError(f"the CSV of torch names no peer, and would be read as one for rank {expected}")
    return f"{action.stage}{action.kind}{action.microbatches[0]}"


def _action(layout: Layout, rank: int, cell: str) -> Action:
    match = _CELL.fullmatch(cell)
    if match is None:
        if cell.endswith("OVERLAP_F_B"):
            raise ScheduleError("a forward and a backward at one time are not supported; write one after the other")
        raise ScheduleError("cannot read it; expected stage, action, microbatch, for example '0F0' or '1SEND_B3'")
    kind, stage = Kind(match["kind"]), int(match["stage"])
    _check_stage(layout, stage)
    where = layout.stages[stage].ranks[0]
    if where != rank:
        raise ScheduleError(
            f"stage {stage} stands on rank {where}, this is the line of rank {rank}; if the stages are not a U, say which "
            "layout it is"
        )
    peer = None if kind.is_compute else _peer(layout, kind, stage)
    return Action(kind, stage, (int(match["microbatch"]),), peer)


def _peer(layout: Layout, kind: Kind, stage: int) -> int:
    """The rank at the other end of a message."""
    _check_stage(layout, stage)
    other = stage - 1 if kind.peer_is_upstream else stage + 1
    if not 0 <= other < len(layout.stages):
        raise ScheduleError(
            f"stage {stage} is the {'first' if other < 0 else 'last'} of the layout; nobody is at the other end"
        )
    peer = layout.stages[other].ranks[0]
    if peer == layout.stages[stage].ranks[0]:
        raise ScheduleError(f"stages {stage} and {other} stand on one rank, nothing is sent between them")
    return peer


def _check_stage(layout: Layout, stage: int) -> None:
    if stage >= len(layout.stages):
        raise ScheduleError(f"there is no stage {stage}; the layout has stages 0..{len(layout.stages) - 1}")
