"""From a compute order to a table: puts in every SEND and RECV.

A planner says what each rank computes, in which order. What must travel follows from the layout; *when* to post it
is decided here, from one global order of everything: the compute actions by the time they end in a simulation,
each followed at once by the SENDs of what it made and, in the peers' rows, by the matching RECVs.

    global order    F s0 m0 │ SEND, RECV │ F s0 m1 │ SEND, RECV │ F s1 m0 │ ...
    row of rank 0   F s0 m0   SEND_F m0    F s0 m1   SEND_F m1
    row of rank 1             RECV_F m0              RECV_F m1    F s1 m0   ...

Why no rank waits for ever. Transfers need both sides to have posted, and each rank works off each of its lanes in
order (the strictest way communicators behave). Suppose a step stands still; look at the earliest entry of the global
order that is not done.
  1. A compute action: everything it takes is earlier in the global order, so it is there, and so are the compute
     actions before it in its row. Posting never blocks. So it can run.
  2. A message: its SEND and RECV are posted, because all compute actions before them in the rows are earlier and done.
     Everything ahead of it on its lanes is earlier too (rows are cut out of one order), so it is transferred.
Either way it was not stuck. The same argument shows that the k-th SEND on a lane meets the k-th RECV.

Hoisting keeps this. A RECV moved above `prefetch` compute actions of its row is only posted earlier; it never passes
another RECV nor a SEND of its own lane, so the order on every lane is unchanged and both steps still hold. (Only if
posting did block, `validate(..., Semantics.BLOCKING)`, a hoisted RECV could wait for what its own rank has yet to compute:
`prefetch=0` gives a table for that.)
"""

from __future__ import annotations

from dataclasses import dataclass

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.bulk import many_objects
from ldt_schedules.planning.channels import Lane, lane_of
from ldt_schedules.planning.dependencies import Dataflow, Value, What
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.numbering import Key, Numbering
from ldt_schedules.planning.simulator import simulate
from ldt_schedules.planning.table import ComputeOrder, ScheduleTable
from ldt_schedules.planning.timeline import Timeline

_Rows = list[list[Action]]


def lower(
    layout: Layout,
    num_microbatches: int,
    compute_order: ComputeOrder,
    forward_only: bool = False,
    prefetch: int = 1,
    timeline: Timeline | None = None,
) -> ScheduleTable:
    """The table that runs `compute_order`: equal to it once its SENDs and RECVs are left out.

    Messages are never packed: a packed F sends each microbatch on its own, so the peer may start with the first.

    Args:
        prefetch: how many compute actions earlier than the global order says a RECV is posted, so that its buffer is
            ready when the message comes.
        timeline: `compute_order` as it was simulated, so that messages go in the order in which they will be made;
            default: a simulation with default costs.

    Raises:
        ScheduleError: the order cannot be run (see `simulate`), or `prefetch` is negative.
    """
    if prefetch < 0:
        raise ScheduleError(f"prefetch is a number of compute actions, 0 or more, got {prefetch}")
    with many_objects():
        rows = _rows_with_messages(layout, num_microbatches, compute_order, forward_only, timeline)
        if prefetch:
            rows = [_hoist_receives(rank, row, prefetch) for rank, row in enumerate(rows)]
        return ScheduleTable.from_rows(layout, num_microbatches, rows, forward_only)


def _rows_with_messages(
    layout: Layout, num_microbatches: int, compute_order: ComputeOrder, forward_only: bool, timeline: Timeline | None
) -> _Rows:
    numbers = Numbering(Dataflow(layout, forward_only), num_microbatches)
    routes: dict[Key, list[_Route]] = {}
    rows: _Rows = [[] for _ in range(layout.num_ranks)]
    for span in (timeline or simulate(layout, compute_order)).spans:
        action, rank = span.action, span.rank
        rows[rank].append(action)
        key = numbers.key(action)
        if key not in routes:
            routes[key] = _routes(numbers.flow, action)
        for m in action.microbatches:
            for route in routes[key]:
                rows[rank].append(Action(route.send, action.stage, (m,), route.receiver, route.there))
                rows[route.receiver].append(Action(route.recv, route.other, (m,), rank, route.here))
    return rows


@dataclass(frozen=True, slots=True)
class _Route:
    """A message that actions of one family give rise to: its SEND, its RECV at stage `other` on `receiver`, and the
    stages that must be written `there` (in the SEND) and `here` (in the RECV)."""

    send: Kind
    recv: Kind
    other: int
    receiver: int
    there: int | None
    here: int | None


def _routes(flow: Dataflow, action: Action) -> list[_Route]:
    routes = []
    for value in flow.makes(Action(action.kind, action.stage, action.microbatches[:1])):
        if value.what is What.OUTPUT:
            kinds = Kind.SEND_F, Kind.RECV_F
        elif value.what is What.INPUT_GRAD:
            kinds = Kind.SEND_B, Kind.RECV_B
        else:
            continue
        here, there = _written(flow, value)
        receiver = flow.layout.rank_of(value.other, value.microbatch)
        routes.append(_Route(*kinds, value.other, receiver, there, here))
    return routes


def _written(flow: Dataflow, value: Value) -> tuple[int | None, int | None]:
    """The stages at the two ends of an OUTPUT or INPUT_GRAD where they must be written, because the other end's
    rank alone would not say which is meant."""
    layout, stage, other, m = flow.layout, value.stage, value.other, value.microbatch
    forward = value.what is What.OUTPUT
    mine = layout.consumers(stage) if forward else tuple(flow.gradients_to(stage))
    theirs = layout.inputs(other) if forward else layout.consumers(other)
    ambiguous_there = len(layout.neighbours_on(mine, layout.rank_of(other, m), m)) > 1
    ambiguous_here = len(layout.neighbours_on(theirs, layout.rank_of(stage, m), m)) > 1
    return stage if ambiguous_here else None, other if ambiguous_there else None


@dataclass(slots=True)
class _Gap:
    """What stands between two compute actions of a row: first what was there, then what was hoisted to here."""

    stays: list[Action]
    hoisted: list[Action]


def _hoist_receives(rank: int, row: list[Action], prefetch: int) -> list[Action]:
    """Move each RECV of a row `prefetch` gaps up, as far as its lane allows.

    Gap k stands before the k-th compute action. A RECV goes to the end of its new gap, never above the gap of the
    previous RECV, nor above a gap with an earlier SEND on its lane (a rank of a U has none: it sends and receives on
    different lanes).
    """
    compute = [action for action in row if action.kind.is_compute]
    gaps = [_Gap([], []) for _ in range(len(compute) + 1)]
    lanes: dict[tuple[int | None, bool], Lane] = {}
    last_send: dict[Lane, int] = {}
    here = last_recv = 0
    for action in row:
        if action.kind.is_compute:
            here += 1
            continue
        way = (action.peer, action.kind.is_send)
        if way not in lanes:
            lanes[way] = lane_of(rank, action)
        if action.kind.is_send:
            last_send[lanes[way]] = here
            gaps[here].stays.append(action)
            continue
        target = max(here - prefetch, last_recv, last_send.get(lanes[way], 0))
        (gaps[target].hoisted if target < here else gaps[here].stays).append(action)
        last_recv = target
    hoisted_row = [*gaps[0].stays, *gaps[0].hoisted]
    for action, gap in zip(compute, gaps[1:], strict=True):
        hoisted_row += [action, *gap.stays, *gap.hoisted]
    return hoisted_row
