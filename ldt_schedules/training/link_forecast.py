"""What a run expects of its link, with figures that were measured: bytes a step, time on the wire, the step that comes of it.

    forecast = forecast_link(config, table_source(config), figures)
    forecast.verdict              # "the link is busy 12% of a step …"

Bytes are `planned_traffic`'s. The step is simulated on the run's own table with the cost model's computations, three
times: over the link as it was measured, as `hardware` declares it, and over one that takes no time. What the last two
tell apart is whether the wire is full (fewer bytes help) or too long (another order helps).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ldt_schedules.comm.crossing_plan import Direction
from ldt_schedules.comm.gate import kind_of
from ldt_schedules.comm.probe.figures import LinkFigures
from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.session import TableSource
from ldt_schedules.planning.costs import Costs, Link
from ldt_schedules.planning.planners import PLAN_FOR_COSTS
from ldt_schedules.planning.simulator import simulate
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.planning.timeline import Timeline
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.cost_model import problem_of
from ldt_schedules.training.planned_traffic import (
    PlannedTraffic,
    message_spec,
    planned_traffic,
    total,
)
from ldt_schedules.training.section import Section

_FULL = 0.8
"""A wire that is busy for this share of a step decides how long the step takes."""
_FELT = 0.1
"""A link that makes a step longer by this much is worth a word."""
_COSTS = ("edge_tflops", "cloud_tflops")


class ForecastRow(Section):
    """What one kind of message adds up to in a step."""

    step: str
    direction: str
    what: str
    messages: int
    bytes: int


class Forecast(Section):
    """Times in seconds; a step is a training step.

    Attributes:
        up_wire_s, down_wire_s: how long a step's bytes hold the wire.
        step_s, bubble: simulated, over the link as measured; None where the cost model does not know the model.
        declared_step_s: over the link that `hardware` declares.
        unlinked_step_s: over one that takes no time.
        assumed: what the computations are taken to cost where the config does not say.
    """

    num_microbatches: int
    rows: list[ForecastRow]
    up_wire_s: float
    down_wire_s: float
    step_s: float | None
    bubble: float | None
    declared_step_s: float | None
    unlinked_step_s: float | None
    assumed: list[str]
    verdict: str


class _Steps(NamedTuple):
    measured: Timeline
    declared: Timeline
    unlinked: Timeline


def forecast_link(config: TrainConfig, table_for: TableSource, figures: LinkFigures) -> Forecast:
    """Of a run of two sites."""
    table = table_for(config.num_microbatches, False)
    lead = config.link.boundary == "lead"
    training = planned_traffic(table, config.topology, message_spec(config), lead)
    evaluation = planned_traffic(table_for(config.num_microbatches, True), config.topology, message_spec(config), lead)
    up = total(training, Direction.UP).num_bytes / max(figures.up, 1.0)
    down = total(training, Direction.DOWN).num_bytes / max(figures.down, 1.0)
    steps, assumed = _steps(config, table, figures)
    return Forecast(
        num_microbatches=config.num_microbatches,
        rows=[*_rows("training", training), *_rows("evaluation", evaluation)],
        up_wire_s=up,
        down_wire_s=down,
        step_s=None if steps is None else steps.measured.makespan,
        bubble=None if steps is None else steps.measured.bubble,
        declared_step_s=None if steps is None else steps.declared.makespan,
        unlinked_step_s=None if steps is None else steps.unlinked.makespan,
        assumed=assumed,
        verdict=_verdict(config, steps, up, down),
    )


def over_measured_link(costs: Costs, figures: LinkFigures, edge_replicas: int) -> Costs:
    """The same computations over the link as it was measured; all replicas of the edge use it at once."""
    rates = {"up": figures.up, "down": figures.down}
    return _with_links(
        costs,
        {name: Link(figures.rtt_s / 2, max(rate, 1.0) / edge_replicas, name) for name, rate in rates.items()},
    )


def _steps(config: TrainConfig, table: ScheduleTable, figures: LinkFigures) -> tuple[_Steps | None, list[str]]:
    """The three simulated steps, and what was assumed; None where the cost model lacks something, with what it lacks."""
    try:
        costs = problem_of(config).costs
    except ConfigError as error:
        return None, [f"no step is simulated: {error}"]
    declared = costs
    measured = over_measured_link(costs, figures, config.topology.edge.data)
    unlinked = _with_links(costs, {name: Link(0.0, None, name) for name in ("up", "down")})
    layout = table.layout
    steps = _Steps(*(simulate(layout, table.ranks, each) for each in (measured, declared, unlinked)))
    missing = [name for name in _COSTS if name not in config.hardware.model_fields_set]
    return steps, [
        f"hardware.{name} is not in the config: {getattr(config.hardware, name):g} TFLOP/s a device are assumed"
        for name in missing
    ]


def _with_links(costs: Costs, links: dict[str, Link]) -> Costs:
    """The cost model names the two wires between the sites `up` and `down`."""
    return replace(costs, links=tuple((a, b, links[link.resource or ""]) for a, b, link in costs.links))


def _rows(step: str, planned: PlannedTraffic) -> list[ForecastRow]:
    return [
        ForecastRow(
            step=step,
            direction=str(direction),
            what=kind_of(what),
            messages=count.messages,
            bytes=count.num_bytes,
        )
        for (direction, what), count in planned.items()
        if count.messages
    ]


def _verdict(config: TrainConfig, steps: _Steps | None, up_s: float, down_s: float) -> str:
    wire, way = max((up_s, "up"), (down_s, "down"))
    if steps is None:
        return f"a step holds the wire {way} for {time_text(wire)}; how long a step computes is not known here"
    step, unlinked = steps.measured.makespan, steps.unlinked.makespan
    share, longer = wire / step if step else 0.0, step / unlinked - 1 if unlinked else 0.0
    if share >= _FULL and longer > _FELT:
        return (
            f"the link is the bottleneck: the wire {way} is busy {time_text(wire)} of {time_text(step)} a step, which would "
            f"take {time_text(unlinked)} over a link of no cost; fewer bytes: {_fewer_bytes(config)}"
        )
    if longer > _FELT:
        return (
            f"the link is busy {share:.0%} of a step, but makes it {longer:.0%} longer ({time_text(step)} instead of "
            f"{time_text(unlinked)}): {_better_order(config)}"
        )
    return f"the link is busy {share:.0%} of a step of {time_text(step)}, and makes it {max(longer, 0.0):.0%} longer"


def _fewer_bytes(config: TrainConfig) -> str:
    """What a user can do about a full wire. Microbatches only cut the same bytes in other ways."""
    advice = []
    if config.model.precision in ("fp32", "fp64"):
        part = "a quarter" if config.model.precision == "fp64" else "half"
        advice.append(f"model.precision=bf16 sends {part} of them")
    if config.has_vision and not config.vision.frozen:
        advice.append("vision.frozen=[vit,projector] sends no gradients in the first lap")
    advice.append("a model with more layers for its width (bytes grow with hidden_size x tokens alone)")
    return ", or ".join([*advice, "a faster link"])


def _better_order(config: TrainConfig) -> str:
    planned = config.schedule.table is None and config.schedule.planner in PLAN_FOR_COSTS
    order = "" if planned else "schedule.planner=auto with hardware.link_latency_ms as measured, or "
    return f"its latency and the size of single messages are felt; {order}more and smaller microbatches fill the wait"


def time_text(seconds: float) -> str:
    """With the unit that suits."""
    for scale, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"
