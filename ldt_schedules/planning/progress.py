"""Does a table run to its end? Plays it without times, under one of three assumptions about messages, each stricter:

    buffered     posting takes no time, and a message passes whatever else is under way; gloo, which matches by tag (that
                 both sides must have posted it makes no difference here: a row posts each RECV before it needs it)
    rendezvous   each lane of a rank works in order, as a communicator of nccl or hccl does: what was posted first must
                 pass first, once both sides have posted it
    blocking     rendezvous, and a rank also waits for each of its own messages before it goes on

A computation waits for what it takes. If then nobody can go on, nobody ever will, and some ranks wait for each other in
a circle. What runs under one runs under those before it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.channels import Lane, lane_of
from ldt_schedules.planning.dependencies import Dataflow
from ldt_schedules.planning.numbering import Family, Numbering
from ldt_schedules.planning.table import ScheduleTable


class Semantics(str, Enum):
    """How messages pass; the assumptions above, the strictest last."""

    BUFFERED = "buffered"
    RENDEZVOUS = "rendezvous"
    BLOCKING = "blocking"


@dataclass(frozen=True, slots=True)
class Stuck:
    """A rank that cannot finish: the index of the action it stands at (the length of its row: it is through, but a
    message it posted never passes), what it waits for in words, and the ranks that it waits for."""

    rank: int
    index: int
    why: str
    waits_for: tuple[int, ...]


Families = list[list[Family]]
"""For each action of each row, what it takes and makes."""


def waiting_forever(
    table: ScheduleTable,
    semantics: Semantics = Semantics.RENDEZVOUS,
    numbers: Numbering | None = None,
    families: Families | None = None,
) -> list[Stuck]:
    """Every rank that cannot finish. The table must be sound otherwise (all values made and taken once).

    `numbers` and `families` (by these numbers) are looked up again where they are not at hand.
    """
    if numbers is None or families is None:
        numbers = numbers or numbering_of(table)
        families = [[numbers.family(action) for action in row] for row in table.ranks]
    return _Play(table, semantics, numbers, families).run()


def numbering_of(table: ScheduleTable) -> Numbering:
    """Numbers for the values of a table."""
    return Numbering(Dataflow(table.layout, table.forward_only), table.num_microbatches)


def circle(stuck: list[Stuck]) -> list[Stuck]:
    """Stuck ranks that wait for each other, each for the next and the last for the first; empty if there are none."""
    by_rank = {one.rank: one for one in stuck}
    for start in stuck:
        path: list[int] = []
        rank: int | None = start.rank
        while rank is not None and rank not in path:
            path.append(rank)
            rank = next((r for r in by_rank[rank].waits_for if r in by_rank), None)
        if rank is not None:
            return [by_rank[r] for r in path[path.index(rank) :]]
    return []


@dataclass(frozen=True, slots=True, eq=False)
class _Port:
    """Where a rank posts the messages of a family: what it has posted on their lane and has not passed yet, in order, and
    the same of the peer. Add `received_as` to the number of a message for that of the value it brings."""

    rank: int
    peer: int
    queue: _Queue
    opposite: _Queue
    received_as: int


_Queue = deque[tuple[int, _Port]]
"""Messages, each with the port it was posted at."""


class _Play:
    """`position[r]` is the action rank r stands at, `waits[r]` the value it waits for; `there[v]`: value v is made, or
    message v has passed."""

    def __init__(self, table: ScheduleTable, semantics: Semantics, numbers: Numbering, families: Families) -> None:
        self.rows, self.numbers = table.ranks, numbers
        self.buffered, self.blocking = semantics is Semantics.BUFFERED, semantics is Semantics.BLOCKING
        self.families = families
        self.position = [0] * len(self.rows)
        self.waits = [-1] * len(self.rows)
        self.there = bytearray(numbers.size)
        self.queues: list[dict[Lane, _Queue]] = [{lane: deque() for lane in Lane} for _ in self.rows]
        self.ports: dict[Family, _Port] = {}
        self.ready: list[int] = []

    def run(self) -> list[Stuck]:
        self.ready = list(range(len(self.rows)))
        while self.ready:
            self._advance(self.ready.pop())
        stuck = [self._stuck(r) for r, row in enumerate(self.rows) if self.position[r] < len(row)]
        for rank, row in enumerate(self.rows):
            heads = self._heads(rank)
            if self.position[rank] == len(row) and heads:
                why = "is through, but a message it posted never passes"
                stuck.append(Stuck(rank, len(row), why, tuple(peer for _, peer in heads)))
        return sorted(stuck, key=lambda one: one.rank)

    def _advance(self, rank: int) -> None:
        row, families, there = self.rows[rank], self.families[rank], self.there
        for index in range(self.position[rank], len(row)):
            action, family = row[index], families[index]
            first, kind = action.microbatches[0], action.kind
            if not kind.is_recv:
                for base in family.takes:
                    if not there[base + first]:
                        self.position[rank], self.waits[rank] = index, base + first
                        return
            if kind.is_compute:
                for base in family.makes:
                    there[base + first] = 1
            elif not self._post(rank, action, family):
                self.position[rank] = index
                return
        self.position[rank] = len(row)

    def _post(self, rank: int, action: Action, family: Family) -> bool:
        """Post a SEND or RECV; True when the rank may go on."""
        first, sends = action.microbatches[0], action.kind.is_send
        bases = family.makes if sends else family.takes
        port = self.ports.get(family)
        if port is None:
            port = self.ports[family] = self._port(rank, action, bases[0] + first)
        if self.buffered:
            if sends:
                for base in bases:
                    self._arrive(base + first, port)
            return True
        last = bases[-1] + first
        if self.blocking and self.waits[rank] == last:
            return bool(self.there[last])  # posted when the rank came here first
        queue = port.queue
        was_empty = not queue
        for base in bases:
            queue.append((base + first, port))
        if was_empty:
            self._pass_messages(queue)
        if self.blocking and not self.there[last]:
            self.waits[rank] = last
            return False
        return True

    def _port(self, rank: int, action: Action, message: int) -> _Port:
        assert action.peer is not None
        lane = lane_of(rank, action)
        queues = self.queues[rank][lane], self.queues[action.peer][lane]
        return _Port(rank, action.peer, *queues, self.numbers.received_as(message) - message)

    def _pass_messages(self, queue: _Queue) -> None:
        """Let pass what both sides now have at the head of a lane, beginning with that of `queue`."""
        look_at = [queue]
        while look_at:
            queue = look_at.pop()
            while queue:
                message, port = queue[0]
                opposite = port.opposite
                if not opposite or opposite[0][0] != message:
                    break
                queue.popleft()
                opposite.popleft()
                self._arrive(message, port)
                look_at.append(opposite)

    def _arrive(self, message: int, port: _Port) -> None:
        """The message is there: note it, and look again at those of its two ranks that wait for it."""
        there, waits = self.there, self.waits
        number = message + port.received_as
        there[message] = there[number] = 1
        if waits[port.rank] in (number, message):
            self.ready.append(port.rank)
        if waits[port.peer] in (number, message):
            self.ready.append(port.peer)

    def _heads(self, rank: int) -> list[tuple[int, int]]:
        """The first message of each of the rank's lanes, with the other rank."""
        return [(queue[0][0], queue[0][1].peer) for queue in self.queues[rank].values() if queue]

    def _stuck(self, rank: int) -> Stuck:
        index, missing = self.position[rank], self.waits[rank]
        heads = self._heads(rank)
        first = "; ".join(f"{self.numbers.value(message)} with rank {peer}" for message, peer in heads)
        why = f"waits for ever for the {self.numbers.value(missing)}"
        return Stuck(rank, index, why + (f"; first in its lanes: {first}" if heads else ""), self._waits_for(rank))

    def _waits_for(self, rank: int) -> tuple[int, ...]:
        """Whom: the other end of the message that must pass before the missing one can, or of the missing one itself."""
        missing = self.waits[rank]
        for queue in self.queues[rank].values():
            if any(missing in (message, message + port.received_as) for message, port in queue):
                return (queue[0][1].peer,)
        for action, family in zip(self.rows[rank], self.families[rank], strict=True):
            values = [base + action.microbatches[0] for base in (*family.takes, *family.makes)]
            if action.peer is not None and missing in values:
                return (action.peer,)
        return ()
