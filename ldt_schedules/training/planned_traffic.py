"""What a step of a whole run sends from site to site: `comm.crossing_plan` for all processes, by direction.

planned = planned_traffic(table, topology, message_spec(config))
planned[Direction.UP, What.ACTIVATION]        # Count(messages=4, num_bytes=1048576)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ldt_schedules.comm.crossing_plan import Count, Direction, MessageSpec, crossing_of
from ldt_schedules.planning.dependencies import Value, What
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.topology import Topology
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.parameters import ELEMENT_BYTES
from ldt_schedules.training.vision_shapes import Patches

CrossingKind = tuple[Direction, What]
PlannedTraffic = Mapping[CrossingKind, Count]
"""What is ACTIVATION or GRADIENT; all four pairs are there, also where nothing crosses."""

CROSSINGS: tuple[CrossingKind, ...] = tuple(
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
    found = {crossing: Count() for crossing in CROSSINGS}
    directions = {direction.sender: direction for direction in Direction}
    for place in topology.places():
        for what, count in crossing_of(place, table, topology, spec, lead).sent.items():
            found[directions[place.site], what].add(count.num_bytes, count.messages)
    return found


def total(planned: PlannedTraffic, direction: Direction) -> Count:
    """Activations and gradients that go one way."""
    both = Count()
    for what in (What.ACTIVATION, What.GRADIENT):
        both.add(planned[direction, what].num_bytes, planned[direction, what].messages)
    return both


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
