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
from typing import NamedTuple

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.costs import Costs, Link
from ldt_schedules.planning.dependencies import Dataflow, What
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.numbering import Numbering
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
    return _Simulation(layout, rows, costs).run()


class _Step(NamedTuple):
    """An entry of a row, prepared: what it takes, and the messages it posts (None in a table: its SENDs do)."""

    action: Action
    duration: float
    takes: list[int]
    makes: list[int]
    messages: list[_Message]


@dataclass(frozen=True, slots=True)
class _Message:
    arrives_as: int
    receiver: int
    send: Action
    transmission: float
    link: Link
    wire: object


class _Simulation:
    """`position[r]` is the index of the step rank r is to run next; `there` the values that are there, with the time
    at which the computation that made them ended."""

    def __init__(self, layout: Layout, rows: Sequence[Sequence[Action]], costs: Costs) -> None:
        self.layout, self.costs = layout, costs
        self.flow = Dataflow(layout)
        microbatches = 1 + max((m for row in rows for action in row for m in action.microbatches), default=0)
        self.numbers = Numbering(self.flow, microbatches)
        self.posts_itself = not any(action.kind.is_send for row in rows for action in row)
        self.durations: dict[tuple[Kind, int], float | None] = {}
        self.rows = [
            [self._prepare(rank, action) for action in row if not action.kind.is_recv] for rank, row in enumerate(rows)
        ]
        self.position = [0] * len(rows)
        self.busy = [False] * len(rows)
        self.free = [0.0] * len(rows)
        self.exposed = [0.0] * len(rows)
        self.there: dict[int, float] = {}
        self.wire_free: dict[object, float] = {}
        self.events: list[tuple[float, int, int, object]] = []
        self.caused = 0
        self.spans: list[Span] = []
        self.transfers: list[Transfer] = []

    def run(self) -> Timeline:
        for rank in range(len(self.rows)):
            self._go_on(rank, 0.0)
        while self.events:
            now, _, rank, what = heapq.heappop(self.events)
            if isinstance(what, _Step):
                self._finish(rank, what, now)
            else:
                number, made = what  # type: ignore[misc]
                self.there[number] = made
            self._go_on(rank, now)
        self._check_done()
        return Timeline(len(self.rows), tuple(self.spans), tuple(self.transfers), tuple(self.exposed))

    def _prepare(self, rank: int, action: Action) -> _Step:
        takes = self.numbers.takes(action)
        if action.kind.is_send:
            return _Step(action, 0.0, takes, [], [self._message(rank, action, number) for number in takes])
        makes, messages = [], []
        for number in self.numbers.makes(action):
            value = self.numbers.value(number)
            if value.what in (What.OUTPUT, What.INPUT_GRAD) and self.posts_itself:
                send = Kind.SEND_F if value.what is What.OUTPUT else Kind.SEND_B
                peer = self.layout.rank_of(value.other, value.microbatch)
                posted = Action(send, value.stage, (value.microbatch,), peer, value.other)
                messages.append(self._message(rank, posted, number))
            else:
                makes.append(number)
        return _Step(action, self._duration(action), takes, makes, messages)

    def _message(self, rank: int, send: Action, number: int) -> _Message:
        value = self.numbers.value(number)
        assert send.peer is not None
        forward = send.kind is Kind.SEND_F
        edge = (value.stage, value.other) if forward else (value.other, value.stage)
        link = self.costs.link(rank, send.peer)
        transmission = link.transmission(self.costs.size(*edge, forward))
        arrives_as = self.numbers.number(self.flow.delivery(value))
        return _Message(arrives_as, send.peer, send, transmission, link, link.resource or (rank, send.peer))

    def _duration(self, action: Action) -> float:
        """`Costs.duration`, remembered where all microbatches take the same time."""
        key = (action.kind, action.stage)
        if key not in self.durations:
            uniform = self.costs.is_uniform(*key)
            self.durations[key] = self.costs.time(*key, action.microbatches[0]) if uniform else None
        one = self.durations[key]
        return self.costs.duration(action) if one is None else one * len(action.microbatches)

    def _go_on(self, rank: int, now: float) -> None:
        """Let the rank post its messages and start its next computation, if it can."""
        row, there = self.rows[rank], self.there
        while not self.busy[rank] and self.position[rank] < len(row):
            step = row[self.position[rank]]
            for number in step.takes:
                if number not in there:
                    return
            self.position[rank] += 1
            if step.action.kind.is_send:
                for number, message in zip(step.takes, step.messages, strict=True):
                    self._post(rank, message, now, there[number])
                continue
            made = max([there[number] for number in step.takes], default=0.0)
            self.exposed[rank] += max(0.0, now - max(self.free[rank], made))
            self.busy[rank] = True
            self.free[rank] = now
            self._cause(now + step.duration, rank, step)

    def _finish(self, rank: int, step: _Step, now: float) -> None:
        self.spans.append(Span(rank, step.action, self.free[rank], now))
        self.busy[rank] = False
        self.free[rank] = now
        for number in step.makes:
            self.there[number] = now
        for message in step.messages:
            self._post(rank, message, now, now)

    def _post(self, rank: int, message: _Message, now: float, made: float) -> None:
        start = max(now, self.wire_free.get(message.wire, 0.0))
        sent = self.wire_free[message.wire] = start + message.transmission
        arrived = sent + message.link.latency
        self.transfers.append(Transfer(rank, message.receiver, message.send, start, sent, arrived))
        self._cause(arrived, message.receiver, (message.arrives_as, made))

    def _cause(self, time: float, rank: int, what: object) -> None:
        self.caused += 1
        heapq.heappush(self.events, (time, self.caused, rank, what))

    def _check_done(self) -> None:
        stuck = [rank for rank, row in enumerate(self.rows) if self.position[rank] < len(row)]
        if not stuck:
            return
        lines = []
        for rank in stuck:
            step = self.rows[rank][self.position[rank]]
            missing = ", ".join(str(self.numbers.value(n)) for n in step.takes if n not in self.there)
            lines.append(f"rank {rank} waits at {step.action} for {missing}")
        raise ScheduleError("the order cannot go on:\n  " + "\n  ".join(lines))
