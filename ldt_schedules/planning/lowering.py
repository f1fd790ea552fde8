"""From an order of computations to a table: puts in every SEND and RECV, each with its peer.

Where they go. The compute order is played once with default costs; that gives one global order, by the time at which
actions end. A message exists at the moment its producer ends, so

* the SEND stands right after its producer, and
* the RECV stands, in the receiver's row, at the same point of the global order: before whatever the receiver starts
  later.

Why this cannot deadlock. Take the messages in global order. Of the first one that is not yet transferred, the
sender has nothing left to do before its SEND but actions that end earlier in the global order, and the same holds
for the receiver's RECV; all their inputs are earlier messages, which are transferred. So both sides reach it, also when a
transfer needs both to have posted (rendezvous). Because sender and receiver list their common messages in one
order, the k-th SEND of a lane is the k-th RECV of it, which is how communicators without tags match them.

Prefetch. A transfer can only start when the receive is posted. A RECV that stands behind a long computation would wait
for it although nothing needs it to. So each RECV is moved up above `prefetch` computations. A rank's receives keep their
order among themselves, and they pass only its computations and sends (which use other lanes), so the argument holds.
"""

from __future__ import annotations

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.dependencies import Dataflow, What
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.simulator import simulate
from ldt_schedules.planning.table import ComputeOrder, ScheduleTable


def lower(
    layout: Layout, num_microbatches: int, order: ComputeOrder, forward_only: bool = False, prefetch: int = 1
) -> ScheduleTable:
    """Insert the communication.

    Args:
        order: F, B, I and W of each rank, as a planner gives them.
        prefetch: how many computations a receive is posted ahead of the point where its message is due.

    Raises:
        ScheduleError: the order cannot be executed.
    """
    flow = Dataflow(layout, forward_only)
    rows: list[list[Action]] = [[] for _ in range(layout.num_ranks)]
    for span in simulate(layout, order).spans:
        rows[span.rank].append(span.action)
        for value in flow.makes(span.action):
            if value.what not in (What.OUTPUT, What.INPUT_GRAD):
                continue
            forward = value.what is What.OUTPUT
            microbatch = (value.microbatch,)
            receiver = layout.rank_of(value.other, value.microbatch)
            send = Action(Kind.SEND_F if forward else Kind.SEND_B, value.stage, microbatch, receiver)
            recv = Action(Kind.RECV_F if forward else Kind.RECV_B, value.other, microbatch, span.rank)
            rows[span.rank].append(send)
            rows[receiver].append(recv)
    return ScheduleTable.from_rows(layout, num_microbatches, [_prefetched(row, prefetch) for row in rows], forward_only)


def _prefetched(row: list[Action], prefetch: int) -> list[Action]:
    """Move every RECV up above `prefetch` computations; receives stay in order."""
    moved: list[Action] = []
    earliest = 0  # no receive is put before the one placed last
    for action in row:
        if not action.kind.is_recv:
            moved.append(action)
            continue
        position, passed = len(moved), 0
        while position > earliest and passed < prefetch:
            position -= 1
            passed += moved[position].kind.is_compute
        moved.insert(position, action)
        earliest = position + 1
    return moved
