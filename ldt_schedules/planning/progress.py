"""Does a table run to its end? Plays it without times, under one of three assumptions about messages:

    buffered     a SEND leaves its message in a mailbox; a RECV is there to pick it up
    rendezvous   posting takes no time, but a message passes only once both sides have posted it, and each lane of a rank
                 works in order, as a communicator does: what was posted first must pass first
    blocking     rendezvous, and a rank also waits for each of its own messages before it goes on

A computation waits for what it takes. If then nobody can go on, nobody ever will, and some ranks wait for each other in
a circle. Rendezvous is the strictest that the runtime can meet; a transport that buffers, or matches by tag, waits less.
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
    """How messages pass; the three assumptions above."""

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


class _Play:
    def __init__(self, table: ScheduleTable, semantics: Semantics, numbers: Numbering, families: Families) -> None:
        self.rows, self.semantics, self.numbers = table.ranks, semantics, numbers
        self.position = [0] * len(self.rows)
        self.waits = [-1] * len(self.rows)  # the value a rank waits for
        self.families = families
        self.received_as = {f.takes[0]: f.makes[0] for f in numbers.families_of_receives()}
        self.there = bytearray(numbers.size)
        self.passed = bytearray(numbers.size)
        self.lanes = list(Lane)
        self.lane_numbers: dict[tuple[int, object, object], int] = {}
        # What each rank has posted on each of its lanes and has not passed yet, in order: (message, other rank).
        self.queues: list[list[deque[tuple[int, int]]]] = [[deque() for _ in Lane] for _ in self.rows]
        self.ready: list[int] = []

    def run(self) -> list[Stuck]:
        self.ready = list(range(len(self.rows)))
        while self.ready:
            self._advance(self.ready.pop())
        stuck = [self._stuck(r) for r, row in enumerate(self.rows) if self.position[r] < len(row)]
        for rank, row in enumerate(self.rows):
            heads = [queue[0] for queue in self.queues[rank] if queue]
            if self.position[rank] == len(row) and heads:
                why = "is through, but a message it posted never passes"
                stuck.append(Stuck(rank, len(row), why, tuple(peer for _, peer in heads)))
        return sorted(stuck, key=lambda one: one.rank)

    def _advance(self, rank: int) -> None:
        row, families, there = self.rows[rank], self.families[rank], self.there
        while self.position[rank] < len(row):
            action, family = row[self.position[rank]], families[self.position[rank]]
            if not action.kind.is_recv:
                for m in action.microbatches:
                    for base in family.takes:
                        if not there[base + m]:
                            self.waits[rank] = base + m
                            return
            if action.kind.is_compute:
                for m in action.microbatches:
                    for base in family.makes:
                        there[base + m] = 1
            elif not self._post(rank, action, family.takes if action.kind.is_recv else family.makes):
                return
            self.position[rank] += 1

    def _post(self, rank: int, action: Action, bases: tuple[int, ...]) -> bool:
        """Post a SEND or RECV; True when the rank may go on."""
        peer = action.peer
        assert peer is not None
        messages = [base + m for m in action.microbatches for base in bases]
        if self.semantics is Semantics.BUFFERED:
            if action.kind.is_send:
                for message in messages:
                    self._arrive(message, peer)
            return True
        if self.semantics is Semantics.BLOCKING and self.waits[rank] == messages[-1]:
            return bool(self.passed[messages[-1]])  # posted when the rank came here first
        lane = self._lane(rank, action)
        queue = self.queues[rank][lane]
        first = not queue
        queue.extend((message, peer) for message in messages)
        if first:
            self._pass_messages(rank, lane)
        if self.semantics is Semantics.BLOCKING and not self.passed[messages[-1]]:
            self.waits[rank] = messages[-1]
            return False
        return True

    def _lane(self, rank: int, action: Action) -> int:
        key = (rank, action.peer, action.kind.is_send)
        known = self.lane_numbers.get(key)
        if known is None:
            known = self.lane_numbers[key] = self.lanes.index(lane_of(rank, action))
        return known

    def _pass_messages(self, rank: int, lane: int) -> None:
        """Let pass what both sides now have at the head of this lane."""
        look_at = [rank]
        while look_at:
            owner = look_at.pop()
            queue = self.queues[owner][lane]
            while queue:
                message, peer = queue[0]
                other = self.queues[peer][lane]
                if not other or other[0] != (message, owner):
                    break
                queue.popleft()
                other.popleft()
                self.passed[message] = 1
                self._arrive(message, owner)
                self._arrive(message, peer)
                look_at.append(peer)

    def _arrive(self, message: int, rank: int) -> None:
        """The message is there: note it, and look at `rank` again if it waits for it."""
        m = message % self.numbers.num_microbatches
        number = self.received_as[message - m] + m
        self.there[number] = 1
        if self.waits[rank] in (number, message):
            self.ready.append(rank)

    def _stuck(self, rank: int) -> Stuck:
        index, missing = self.position[rank], self.waits[rank]
        heads = [queue[0] for queue in self.queues[rank] if queue]
        first = "; ".join(f"{self.numbers.value(message)} with rank {peer}" for message, peer in heads)
        why = f"waits for ever for the {self.numbers.value(missing)}"
        return Stuck(rank, index, why + (f"; first in its lanes: {first}" if heads else ""), self._waits_for(rank))

    def _waits_for(self, rank: int) -> tuple[int, ...]:
        """Whom: the other end of the message that must pass before the missing one can, or of the missing one itself."""
        missing = self.waits[rank]
        for queue in self.queues[rank]:
            if any(missing in (message, self._received(message)) for message, _ in queue):
                return (queue[0][1],)
        for action, family in zip(self.rows[rank], self.families[rank], strict=True):
            values = [base + m for base in (*family.takes, *family.makes) for m in action.microbatches]
            if action.peer is not None and missing in values:
                return (action.peer,)
        return ()

    def _received(self, message: int) -> int:
        m = message % self.numbers.num_microbatches
        return self.received_as.get(message - m, -1 - m) + m
