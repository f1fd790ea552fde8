"""What a step sends from site to site, by arithmetic on its table: the one home of that rule.

    planned = planned_traffic(table, topology, message_spec(config))
    planned[Direction.UP, What.ACTIVATION]        # Count(messages=4, bytes=1048576)

Every SEND whose peer is on the other site is counted, for each of its microbatches and for all processes that hold its
pipeline rank. One message is one *piece*: between tensor-parallel groups of other sizes one copy of the tensor crosses,
cut along its sequence (`topology.py`, `comm/boundary.py`), so the pieces of a tensor add up to it and to no more:

    edge 1 process, cloud 2      1 tensor, 2 messages of half of it each

A sequence that cannot be cut crosses whole, in one message. A tensor without an element is not sent. Counted is what the
tensors hold; headers, sums over the sites and what TCP/IP adds are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple

from ldt_schedules.planning.dependencies import Dataflow, Value, What
from ldt_schedules.planning.layout import EDGE_RANK
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.topology import Place, Topology
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.parameters import ELEMENT_BYTES
from ldt_schedules.training.vision_shapes import Patches


class Direction(str, Enum):
    """Over the link: up is from the edge to the cloud."""

    UP = "up"
    DOWN = "down"

    def __str__(self) -> str:
        return self.value


class MessageSpec(NamedTuple):
    """One tensor as one edge replica has it, put together from its tensor-parallel processes.

    Attributes:
        shape: `[s, b, h]`; the first dimension is the one that is cut.
        itemsize: bytes of an element.
    """

    shape: tuple[int, ...]
    itemsize: int


class Count(NamedTuple):
    """Of a step, all replicas together."""

    messages: int = 0
    bytes: int = 0

    def and_(self, other: Count) -> Count:
        return Count(self.messages + other.messages, self.bytes + other.bytes)


Crossing = tuple[Direction, What]
PlannedTraffic = Mapping[Crossing, Count]
"""What is ACTIVATION or GRADIENT; all four pairs are there, also where nothing crosses."""

CROSSINGS: tuple[Crossing, ...] = tuple(
    (direction, what) for direction in Direction for what in (What.ACTIVATION, What.GRADIENT)
)


def planned_traffic(
    table: ScheduleTable, topology: Topology, spec: Callable[[Value], MessageSpec], lead: bool = False
) -> PlannedTraffic:
    """What the whole run sends in one step, or evaluation, that follows `table`.

    Args:
        spec: of an ACTIVATION or GRADIENT, as `Dataflow` names it; called for each microbatch.
        lead: `link.boundary: lead`, every tensor crosses whole.
    """
    found = dict.fromkeys(CROSSINGS, Count())
    flow, senders = Dataflow(table.layout, table.forward_only), _places_by_rank(topology)
    known: dict[tuple[int, int, MessageSpec], Count] = {}
    for rank, row in enumerate(table.ranks):
        for action in row:
            if action.peer is None or (rank == EDGE_RANK) == (action.peer == EDGE_RANK):
                continue
            if not action.kind.is_send:
                continue
            direction = Direction.UP if rank == EDGE_RANK else Direction.DOWN
            for value in flow.makes(action):
                sent = spec(value)
                key = rank, action.peer, sent
                if key not in known:
                    known[key] = _pieces_of(topology, senders[rank], action.peer, sent, lead)
                found[direction, value.what] = found[direction, value.what].and_(known[key])
    return found


def total(planned: PlannedTraffic, direction: Direction) -> Count:
    """Activations and gradients that go one way."""
    return planned[direction, What.ACTIVATION].and_(planned[direction, What.GRADIENT])


def message_spec(config: TrainConfig) -> Callable[[Value], MessageSpec]:
    """What each message of a run is: `[s, b, h]`, and in a vision-language model's first lap patches.

    How many patches a sample has is data; here it is what a plan takes it for (`hardware.images_per_sample`).
    """
    itemsize = ELEMENT_BYTES[config.model.precision]
    text = MessageSpec((config.model.seq_length, config.train.micro_batch_size, config.model.hidden_size), itemsize)
    if not config.has_vision:
        return lambda value: text
    patches = MessageSpec((round(Patches.of(config).count), 1, config.vision.hidden_size), itemsize)
    joining = config.lap_layers.joining_stage
    return lambda value: patches if value.stage < joining else text


def _places_by_rank(topology: Topology) -> dict[int, list[Place]]:
    places: dict[int, list[Place]] = {}
    for place in topology.places():
        places.setdefault(place.pipeline_rank, []).append(place)
    return places


def _pieces_of(topology: Topology, senders: list[Place], peer: int, sent: MessageSpec, lead: bool) -> Count:
    """One tensor of `sent` from each group of processes that hold the sender's rank."""
    length, row = sent.shape[0], math.prod(sent.shape[1:]) * sent.itemsize
    if not length * row:
        return Count()
    whole = lead or length % topology.parts != 0
    count = Count()
    for place in senders:
        for piece in topology.pieces(place, peer, whole):
            start, stop = piece.bounds(length)
            count = count.and_(Count(1, (stop - start) * row))
    return count
