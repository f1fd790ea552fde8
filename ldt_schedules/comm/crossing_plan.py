"""What a step sends from site to site, by arithmetic on its table: the one home of that rule.

Every SEND and RECV whose peer is on the other site is counted, for each of its microbatches. One message is one *piece*:
between tensor-parallel groups of other sizes one copy of the tensor crosses, cut along its sequence (`topology.py`,
`comm/boundary.py`), so the pieces of a tensor add up to it and to no more:

    edge 1 process, cloud 2      1 tensor, 2 messages of half of it each

A sequence that cannot be cut crosses whole, in one message. A tensor without an element is not sent. Counted is what the
tensors hold; headers, sums over the sites and what TCP/IP adds are not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from ldt_schedules.planning.dependencies import Dataflow, Value, What
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.topology import Place, Site, Topology


class Direction(str, Enum):
    """Over the link: up is from the edge to the cloud."""

    UP = "up"
    DOWN = "down"

    def __str__(self) -> str:
        return self.value

    @property
    def sender(self) -> Site:
        return Site.EDGE if self is Direction.UP else Site.CLOUD

    @property
    def receiver(self) -> Site:
        return Site.CLOUD if self is Direction.UP else Site.EDGE


@dataclass
class Count:
    """Messages, and bytes of their contents."""

    messages: int = 0
    num_bytes: int = 0

    def add(self, num_bytes: int, messages: int = 1) -> None:
        self.messages += messages
        self.num_bytes += num_bytes


class MessageSpec(NamedTuple):
    """One tensor as a group of tensor-parallel processes has it, put together.

    Attributes:
        shape: `[s, b, h]`; the first dimension is the one that is cut.
        itemsize: bytes of an element.
    """

    shape: tuple[int, ...]
    itemsize: int


@dataclass
class Crossing:
    """What one process sends to the other site in a step, and receives from there."""

    sent: dict[What, Count] = field(default_factory=dict)
    received: dict[What, Count] = field(default_factory=dict)


def crossing_of(
    place: Place, table: ScheduleTable, topology: Topology, spec: Callable[[Value], MessageSpec], lead: bool = False
) -> Crossing:
    """Of the process at `place`, in one step that follows `table`.

    Args:
        spec: of an ACTIVATION or GRADIENT, as `Dataflow` names it; called for each microbatch.
        lead: every tensor crosses whole.
    """
    flow, crossing = Dataflow(table.layout, table.forward_only), Crossing()
    times: Counter[tuple[bool, int, What, MessageSpec]] = Counter()
    for action in table.ranks[place.pipeline_rank]:
        if action.peer is None or not topology.crosses(place, action.peer):
            continue
        values = flow.makes(action) if action.kind.is_send else flow.takes(action)
        times.update((action.kind.is_send, action.peer, value.what, spec(value)) for value in values)
    for (is_send, peer, what, message), count in times.items():
        counts = crossing.sent if is_send else crossing.received
        messages, num_bytes = _pieces(topology, place, peer, message, lead)
        counts.setdefault(what, Count()).add(count * num_bytes, count * messages)
    return crossing


def _pieces(topology: Topology, place: Place, peer: int, message: MessageSpec, lead: bool) -> tuple[int, int]:
    """How many pieces of a tensor this process exchanges with those that hold `peer`, and their bytes."""
    length, row = message.shape[0], math.prod(message.shape[1:]) * message.itemsize
    if not length * row:
        return 0, 0
    bounds = [piece.bounds(length) for piece in topology.pieces(place, peer, lead or length % topology.parts != 0)]
    return len(bounds), sum((stop - start) * row for start, stop in bounds)
