"""Plays a schedule on paper: when does each action start and end, if every duration is as `Costs` says?

Each rank runs its row in order, one computation at a time, and starts one as soon as everything it takes is there.
Messages travel beside the computation. On a link they queue for the wire, each direction for itself:

    rank 0   F0 F1 F2 ·  ·  ·  ·            a SEND only posts; the wire takes messages in the order they were posted
    wire     ·  [m0 ][m1 ][m2 ]             size / bandwidth each
    latency        ······ m0 there
    rank 1   ·  ·  ·  ·  ·  F0 ·  F1

A RECV takes no time: lanes have buffers, and receives are posted early. In a compute order, without SENDs, every
message is posted when its value is made.

Events are worked off by time; of two at one time, the one that was caused first.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.bulk import many_objects
from ldt_schedules.planning.costs import Costs
from ldt_schedules.planning.dependencies import Dataflow, What
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.numbering import Family, Numbering
from ldt_schedules.planning.timeline import Span, Timeline, Transfer


def simulate(layout: Layout, rows: Sequence[Sequence[Action]], costs: Costs | None = None) -> Timeline:
    """Time the actions of `rows`, one sequence for each rank: a compute order, or the rows of a table.

    Equal input gives equal output.

    Raises:
        ScheduleError: costs that do not fit the layout, or an order in which some rank waits for ever; the message
            names every waiting rank, its action and the missing values.
    """
    costs = costs or Costs()
    costs.check_fit(layout)
    if len(rows) != layout.num_ranks:
        raise ScheduleError(f"the layout has {layout.num_ranks} pipeline ranks, the order has {len(rows)} rows")
    with many_objects():
        return _Simulation(layout, rows, costs).run()


@dataclass(frozen=True, slots=True)
class _Message:
    """What one message of a family has in common with the others: its microbatch, and what it is called on arrival, count
    from the first microbatch of the action; `kind`, `stage` and `other` are those of the SEND that posts it."""

    microbatch: int
    arrives_as: int
    sender: int
    receiver: int
    kind: Kind
    stage: int
    other: int | None
    transmission: float
    latency: float
    wire: int


@dataclass(frozen=True, slots=True)
class _Steps:
    """What the actions of a family have in common (see `numbering`)."""

    posts: bool
    duration: float | None
    takes: tuple[int, ...]
    makes: tuple[int, ...]
    messages: tuple[_Message, ...]


class _Simulation:
    """`position[r]` is the index of the step rank r is to run next; `there[v]` is when the computation that made value v
    ended, once v is there."""

    def __init__(self, layout: Layout, rows: Sequence[Sequence[Action]], costs: Costs) -> None:
        self.layout, self.costs = layout, costs
        self.flow = Dataflow(layout)
        microbatches = 1 + max((m for row in rows for action in row for m in action.microbatches), default=0)
        self.numbers = Numbering(self.flow, microbatches)
        self.posts_itself = not any(action.kind.is_send for row in rows for action in row)
        self.wires: dict[object, int] = {}
        self.rows = self._prepare(rows)
        self.position = [0] * len(rows)
        self.busy = [False] * len(rows)
        self.free = [0.0] * len(rows)
        self.exposed = [0.0] * len(rows)
        self.there: list[float | None] = [None] * self.numbers.size
        self.wire_free = [0.0] * len(self.wires)
        # (time, how many were caused before, rank, value that arrives or -1: its computation ends, when it was made)
        self.events: list[tuple[float, int, int, int, float]] = []
        self.caused = 0
        self.spans: list[Span] = []
        self.transfers: list[Transfer] = []

    def run(self) -> Timeline:
        events, there, busy, pop = self.events, self.there, self.busy, heapq.heappop
        for rank in range(len(self.rows)):
            self._go_on(rank, 0.0)
        while events:
            now, _, rank, number, made = pop(events)
            if number < 0:
                self._finish(rank, now)
            else:
                there[number] = made
            if not busy[rank]:
                self._go_on(rank, now)
        self._check_done()
        return Timeline(len(self.rows), tuple(self.spans), tuple(self.transfers), tuple(self.exposed))

    def _prepare(self, rows: Sequence[Sequence[Action]]) -> list[list[tuple[Action, _Steps]]]:
        """Each row without its RECVs, with the steps of each action."""
        known: dict[Family, _Steps] = {}
        prepared = []
        for rank, row in enumerate(rows):
            acting = [action for action in row if not action.kind.is_recv]
            families = self.numbers.families(acting)
            for family, action in zip(families, acting, strict=True):
                if family not in known:
                    known[family] = self._steps(rank, action)
            prepared.append([(action, known[family]) for action, family in zip(acting, families, strict=True)])
        return prepared

    def _steps(self, rank: int, action: Action) -> _Steps:
        family, first = self.numbers.family(action), action.microbatches[0]
        if action.kind.is_send:
            messages = [self._message(rank, action, base + first) for base in family.takes]
            return _Steps(True, None, family.takes, (), tuple(messages))
        makes, messages = [], []
        for base in family.makes:
            what, stage, other = self.numbers.what(base + first)
            if what in (What.OUTPUT, What.INPUT_GRAD) and self.posts_itself:
                kind = Kind.SEND_F if what is What.OUTPUT else Kind.SEND_B
                peer = self.layout.rank_of(other, first)
                messages.append(
                    self._message(rank, Action(kind, stage, action.microbatches, peer, other), base + first)
                )
            else:
                makes.append(base)
        uniform = self.costs.is_uniform(action.kind, action.stage)
        duration = self.costs.time(action.kind, action.stage, first) * len(action.microbatches) if uniform else None
        return _Steps(False, duration, family.takes, tuple(makes), tuple(messages))

    def _message(self, rank: int, send: Action, number: int) -> _Message:
        value, first = self.numbers.value(number), send.microbatches[0]
        assert send.peer is not None
        passage = self.costs.passage(rank, send.peer, value.edge)
        return _Message(
            microbatch=value.microbatch - first,
            arrives_as=self.numbers.number(self.flow.delivery(value)) - first,
            sender=rank,
            receiver=send.peer,
            kind=send.kind,
            stage=send.stage,
            other=send.other,
            transmission=passage.transmission,
            latency=passage.latency,
            wire=self.wires.setdefault(passage.wire, len(self.wires)),
        )

    def _go_on(self, rank: int, now: float) -> None:
        """Let the rank post its messages and start its next computation, if it can."""
        row, there = self.rows[rank], self.there
        position, count = self.position[rank], len(row)
        while position < count:
            action, steps = row[position]
            first = action.microbatches[0]
            made_last = 0.0
            for base in steps.takes:
                made = there[base + first]
                if made is None:
                    self.position[rank] = position
                    return
                if made > made_last:
                    made_last = made
            position += 1
            if steps.posts:
                self._post(steps, first, now, made_last)
                continue
            since = max(self.free[rank], made_last)
            if now > since:
                self.exposed[rank] += now - since
            self.free[rank] = now
            end = now + (self.costs.duration(action) if steps.duration is None else steps.duration)
            self.caused += 1
            heapq.heappush(self.events, (end, self.caused, rank, -1, now))
            self.position[rank], self.busy[rank] = position, True
            return
        self.position[rank] = position

    def _finish(self, rank: int, now: float) -> None:
        action, steps = self.rows[rank][self.position[rank] - 1]
        self.spans.append(Span(rank, action, self.free[rank], now))
        self.free[rank], self.busy[rank] = now, False
        first, there = action.microbatches[0], self.there
        for base in steps.makes:
            there[base + first] = now
        if steps.messages:
            self._post(steps, first, now, now)

    def _post(self, steps: _Steps, first: int, now: float, made: float) -> None:
        wire_free = self.wire_free
        for message in steps.messages:
            wire, receiver = message.wire, message.receiver
            start = wire_free[wire]
            if start < now:
                start = now
            sent = wire_free[wire] = start + message.transmission
            arrived = sent + message.latency
            m = first + message.microbatch
            self.transfers.append(
                Transfer(message.sender, receiver, message.kind, message.stage, message.other, m, start, sent, arrived)
            )
            self.caused += 1
            heapq.heappush(self.events, (arrived, self.caused, receiver, first + message.arrives_as, made))

    def _check_done(self) -> None:
        stuck = [rank for rank, row in enumerate(self.rows) if self.position[rank] < len(row)]
        if not stuck:
            return
        lines = []
        for rank in stuck:
            action, steps = self.rows[rank][self.position[rank]]
            taken = [base + action.microbatches[0] for base in steps.takes]
            missing = [str(self.numbers.value(number)) for number in taken if self.there[number] is None]
            lines.append(f"rank {rank} waits at {action} for {', '.join(missing)}")
        raise ScheduleError("the order cannot go on:\n  " + "\n  ".join(lines))
