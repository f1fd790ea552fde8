"""How long things take and how much they hold, as far as a plan needs to know.

Durations are in any one unit of time, memory in any one unit of memory, message sizes in any one unit that the
bandwidths use too; results come in the same units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import EDGE_RANK, Edge, Layout

PerMicrobatch = float | tuple[float, ...] | None
"""One number for every microbatch, one for each, or None where the stage cannot do it."""

PerStage = float | None | tuple[PerMicrobatch, ...]
"""One number for every stage, or one entry for each stage."""


@dataclass(frozen=True, slots=True)
class Link:
    """A directed pipe between two ranks: messages go on the wire one after the other, then travel beside each other.

        sent ──waits for the wire──► ──size / bandwidth──► ──latency──► there

    Attributes:
        latency: from the end of a transmission until the message is there.
        bandwidth: size per time; None is as much as anybody needs.
        resource: links that name the same resource share one wire (a site's one WAN uplink).

    Raises:
        ScheduleError: a negative latency, a bandwidth of 0 or less.
    """

    latency: float = 0.0
    bandwidth: float | None = None
    resource: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.latency) or self.latency < 0:
            raise ScheduleError(f"the latency of a link must be a finite time of 0 or more, got {self.latency}")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ScheduleError(
                f"the bandwidth of a link must be more than 0, got {self.bandwidth}; leave it out for no limit"
            )

    def transmission(self, size: float) -> float:
        """How long a message of `size` holds the wire."""
        return 0.0 if self.bandwidth is None else size / self.bandwidth


class Passage(NamedTuple):
    """The way of a message from rank to rank: how long it holds which wire, and how long it then takes."""

    transmission: float
    latency: float
    wire: str | tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What each stage and each link costs.

    The defaults are the usual rule of thumb: a backward pass takes twice as long as a forward pass, and half of it
    is the gradient of the input. A packed pass over k microbatches takes as long as the k one after the other.

    Attributes:
        forward: one microbatch through one stage (F).
        backward: its full backward (B); None: this stage must split it. Of a frozen stage behind a trained one it is the
            gradient of the input alone.
        input_grad: the gradient of the stage's input alone (I); None: this stage cannot split its backward.
        weight_grad: the gradient of the stage's weights alone (W).
        memory: what one microbatch holds on the stage's rank from the start of F to the end of B or W.
        memory_w: the part of `memory` that stays from the end of I to the end of W; None: all of it.
        latency, bandwidth: of the links between rank 0, the edge, and every other rank; all other links are free.
        links: `(sender, receiver, Link)` for single links; they go before `latency`, `bandwidth` and `default_link`.
        default_link: of every link that nothing else describes.
        forward_size, backward_size: of the messages on every edge of the layout.
        sizes: `(stage, consumer, forward size, backward size)` for single edges.

    Raises:
        ScheduleError: a time, a size or a memory that is negative or not a finite number.
    """

    forward: PerStage = 1.0
    backward: PerStage = 2.0
    input_grad: PerStage = 1.0
    weight_grad: PerStage = 1.0
    memory: PerStage = 1.0
    memory_w: PerStage = None
    latency: float = 0.0
    bandwidth: float | None = None
    links: tuple[tuple[int, int, Link], ...] = ()
    default_link: Link = Link()
    forward_size: float = 1.0
    backward_size: float = 1.0
    sizes: tuple[tuple[int, int, float, float], ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name not in ("links", "default_link", "sizes", "bandwidth"):
                _check_numbers(field.name, getattr(self, field.name))
        for stage, consumer, *sizes in self.sizes:
            _check_numbers(f"the size of a message between stages {stage} and {consumer}", tuple(sizes))
        Link(self.latency, self.bandwidth)

    def check_fit(self, layout: Layout, num_microbatches: int | None = None) -> None:
        """Raises ScheduleError when a stage has no cost, or the costs do not fit the layout or the microbatches."""
        for name in ("forward", "backward", "input_grad", "weight_grad", "memory", "memory_w"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                continue
            if len(value) != len(layout.stages):
                raise ScheduleError(
                    f"{name} gives {len(value)} numbers, but the layout has {len(layout.stages)} stages; give one "
                    "number for all stages, or one for each"
                )
            for stage, times in enumerate(value):
                if num_microbatches is not None and isinstance(times, tuple) and len(times) != num_microbatches:
                    raise ScheduleError(
                        f"{name} of stage {stage} gives {len(times)} numbers for {num_microbatches} microbatches"
                    )
        for stage in range(len(layout.stages)):
            if not self.can(Kind.F, stage):
                raise ScheduleError(f"stage {stage} has no cost for its forward")
            if layout.has_backward(stage) and not self.can(Kind.B, stage) and not self.can(Kind.I, stage):
                raise ScheduleError(f"stage {stage} has no cost for its backward: give b, or i and w")
            if self.can(Kind.I, stage) != self.can(Kind.W, stage):
                raise ScheduleError(f"stage {stage} has only one of i and w; a split backward needs both")
            if self.held_after_input_grad(stage) > self.held(stage):
                raise ScheduleError(
                    f"stage {stage} holds {self.held(stage):g}, so {self.held_after_input_grad(stage):g} cannot stay "
                    "between I and W"
                )
        for sender, receiver, _ in self.links:
            if not (0 <= sender < layout.num_ranks and 0 <= receiver < layout.num_ranks):
                raise ScheduleError(
                    f"a link goes from rank {sender} to rank {receiver}; ranks are 0..{layout.num_ranks - 1}"
                )

    def can(self, kind: Kind, stage: int) -> bool:
        """Has the stage a cost for this kind of action?"""
        return _of_stage(self._table(kind), stage) is not None

    def time(self, kind: Kind, stage: int, microbatch: int) -> float:
        """How long one microbatch holds the stage's rank.

        Raises:
            ScheduleError: the stage has no cost for this kind of action.
        """
        time = _of_stage(self._table(kind), stage)
        if time is None:
            allowed = "I and W" if kind is Kind.B else "B"
            raise ScheduleError(f"{kind} of stage {stage} has no cost; this stage's backward is done as {allowed}")
        return time[microbatch] if isinstance(time, tuple) else time

    def is_uniform(self, kind: Kind, stage: int) -> bool:
        """Do all microbatches take the same time?"""
        time = _of_stage(self._table(kind), stage)
        return not isinstance(time, tuple) or len(set(time)) == 1

    def _table(self, kind: Kind) -> PerStage:
        if kind is Kind.F:
            return self.forward
        if kind is Kind.B:
            return self.backward
        return self.input_grad if kind is Kind.I else self.weight_grad

    def duration(self, action: Action) -> float:
        """How long a compute action holds its rank."""
        return sum(self.time(action.kind, action.stage, m) for m in action.microbatches)

    def held(self, stage: int) -> float:
        """What one microbatch of `stage` holds from the start of F."""
        memory = _of_stage(self.memory, stage)
        assert isinstance(memory, float | int)
        return memory

    def held_after_input_grad(self, stage: int) -> float:
        """The part of `held` that stays from the end of I to the end of W."""
        memory = _of_stage(self.memory_w, stage)
        assert memory is None or isinstance(memory, float | int)
        return self.held(stage) if memory is None else memory

    def link(self, sender: int, receiver: int) -> Link:
        """What joins two ranks."""
        for source, destination, link in self.links:
            if (source, destination) == (sender, receiver):
                return link
        if EDGE_RANK in (sender, receiver) and (self.latency or self.bandwidth is not None):
            return Link(self.latency, self.bandwidth)
        return self.default_link

    def size(self, stage: int, consumer: int, forward: bool) -> float:
        """Of the activation from `stage` to `consumer`, or of the gradient the other way."""
        for source, destination, up, down in self.sizes:
            if (source, destination) == (stage, consumer):
                return up if forward else down
        return self.forward_size if forward else self.backward_size

    def passage(self, sender: int, receiver: int, edge: Edge) -> Passage:
        """Of a message along `edge`, from rank `sender` to rank `receiver`."""
        link = self.link(sender, receiver)
        return Passage(link.transmission(self.size(*edge)), link.latency, link.resource or (sender, receiver))


def _of_stage(value: PerStage, stage: int) -> PerMicrobatch:
    return value[stage] if isinstance(value, tuple) else value


def _check_numbers(name: str, value: PerStage | PerMicrobatch) -> None:
    if isinstance(value, tuple):
        for entry in value:
            _check_numbers(name, entry)
    elif value is not None and (not math.isfinite(value) or value < 0):
        raise ScheduleError(f"{name} must be a finite number of 0 or more, got {value}")
