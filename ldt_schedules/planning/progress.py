"""Does a table run to its end when a message needs both sides? Plays it without times.

Rendezvous: posting a SEND or RECV takes no time, but a message passes only once both sides have posted it. Each lane of
a rank works in order, as a communicator does: what was posted first must pass first. A computation waits for what it
takes. If then nobody can go on, nobody ever will.

That is the strictest model the runtime can meet: a transport that buffers, or matches by tag, only waits less.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator

from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.channels import Lane, lane_of
from ldt_schedules.planning.dependencies import Dataflow, Value
from ldt_schedules.planning.table import ScheduleTable

Post = tuple[Value, int]
"""A message and the other rank."""


def waiting_forever(table: ScheduleTable, blocking: bool = False) -> Iterator[tuple[int, int, str]]:
    """`(rank, index of the action it stands at, what it waits for)` for every rank that cannot finish.

    The table must be sound otherwise (all values made and taken once). With `blocking` a rank also waits for each of its
    own messages before it goes on.
    """
    return _Progress(table, blocking).run()


class _Progress:
    def __init__(self, table: ScheduleTable, blocking: bool) -> None:
        self.rows, self.blocking = table.ranks, blocking
        self.flow = Dataflow(table.layout, table.forward_only)
        self.position = [0] * len(self.rows)
        self.there: set[Value] = set()
        self.passed: set[Value] = set()
        self.posted: set[tuple[int, int]] = set()
        # What each rank has posted on each of its lanes and has not passed yet, in order.
        self.queues: dict[tuple[int, Lane], deque[Post]] = defaultdict(deque)

    def run(self) -> Iterator[tuple[int, int, str]]:
        ready = deque(range(len(self.rows)))
        while ready:
            rank = ready.popleft()
            went_on = True
            while went_on and self.position[rank] < len(self.rows[rank]):
                went_on = self._step(rank)
                ready.extend(self._pass_messages(rank))
        for rank, row in enumerate(self.rows):
            if self.position[rank] < len(row):
                yield rank, self.position[rank], self._why(rank, row[self.position[rank]])
            elif any(queue for (owner, _), queue in self.queues.items() if owner == rank):
                yield rank, len(row) - 1, "at the end of its row: a message it posted never passes"

    def _step(self, rank: int) -> bool:
        """Run or post the rank's next action; False when it must wait."""
        action = self.rows[rank][self.position[rank]]
        if action.kind.is_recv:
            if not self._post(rank, action, self.flow.takes(action)):
                return False
        elif not all(value in self.there for value in self.flow.takes(action)):
            return False
        elif action.kind.is_send:
            if not self._post(rank, action, self.flow.makes(action)):
                return False
        else:
            self.there.update(self.flow.makes(action))
        self.position[rank] += 1
        return True

    def _post(self, rank: int, action: Action, messages: list[Value]) -> bool:
        """True when the rank may go on."""
        assert action.peer is not None
        # A blocked rank comes back to the same action; what it posted then is posted already.
        if (rank, self.position[rank]) not in self.posted:
            self.posted.add((rank, self.position[rank]))
            self.queues[rank, lane_of(rank, action)].extend((message, action.peer) for message in messages)
        return not self.blocking or all(message in self.passed for message in messages)

    def _pass_messages(self, rank: int) -> list[int]:
        """Let pass what both sides now have at the head of their lanes; returns the ranks this may have freed."""
        freed: list[int] = []
        look_at = [rank]
        while look_at:
            owner = look_at.pop()
            for path in Lane:
                queue = self.queues[owner, path]
                while queue:
                    message, peer = queue[0]
                    other = self.queues[peer, path]
                    if not other or other[0] != (message, owner):
                        break
                    queue.popleft()
                    other.popleft()
                    self._arrive(message)
                    freed += [owner, peer]
                    look_at.append(peer)
        return freed

    def _arrive(self, message: Value) -> None:
        self.passed.add(message)
        self.there.add(self.flow.received_as(message))

    def _why(self, rank: int, action: Action) -> str:
        missing = [value for value in self.flow.takes(action) if value not in self.there and not action.kind.is_recv]
        heads = [
            f"{queue[0][0]} with rank {queue[0][1]}" for (r, _), queue in self.queues.items() if r == rank and queue
        ]
        waits = ", ".join(map(str, missing)) or "its own message"
        return f"waits for ever for the {waits}" + (f"; first in its lanes: {'; '.join(heads)}" if heads else "")
