"""Which lane a message travels on, so that no rank waits behind itself.

One communicator of an accelerator runs its operations in order. If a rank's sends and receives shared it, a receive
that waits for a slow peer would hold up the send behind it. So every rank must send on one lane and receive on
another. Where neighbours differ in parity it is enough to colour a message by the parity of its sender:

    u(4)    rank 0 ──PANG──► rank 1 ──PING──► rank 2 ──PANG──► rank 3 ──PING──► rank 0      (forward)
            rank 0 ◄──PING── rank 1 ◄──PANG── rank 2 ◄──PING── rank 3 ◄──PANG── rank 0      (backward)

            even ranks send on PANG and receive on PING, odd ranks the other way round

The U is a ring, because the edge holds both ends. A ring of odd size has no such colouring (it is not bipartite):
going round it, parity alternates, and the last rank has the edge's parity again. On that one link, the wrap-around,
each direction gets a lane of its own:

    u(3)    rank 0 ──PANG──► rank 1 ──PING──► rank 2 ──WRAP_F──► rank 0                     (forward)
            rank 0 ◄──PING── rank 1 ◄──PANG── rank 2 ◄──WRAP_B── rank 0                     (backward)

With P = 2 both directions join the same two ranks; they still are two lanes (0 -> 1 PANG, 1 -> 0 PING).
"""

from __future__ import annotations

from enum import Enum

from ldt_schedules.planning.actions import Action


class Lane(Enum):
    """An ordered path for messages; at run time a process group and a stream of its own."""

    PING = "ping"
    PANG = "pang"
    WRAP_F = "wrap_f"
    WRAP_B = "wrap_b"

    def __str__(self) -> str:
        return self.name


def lane(sender: int, receiver: int) -> Lane:
    """The lane of everything that pipeline rank `sender` sends to pipeline rank `receiver`."""
    if sender % 2 != receiver % 2:
        return Lane.PING if sender % 2 else Lane.PANG
    return Lane.WRAP_F if sender > receiver else Lane.WRAP_B


def lane_of(rank: int, action: Action) -> Lane:
    """The lane of a SEND or RECV that stands in the row of pipeline rank `rank`."""
    assert action.peer is not None, action
    return lane(rank, action.peer) if action.kind.is_send else lane(action.peer, rank)
