"""How long things take, as far as a plan needs to know."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import EDGE_RANK, Layout

Durations = float | tuple[float, ...]
"""One number for every stage, or one for each stage in forward order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Durations in any one unit of time; the results come in the same unit.

    The defaults are the usual rule of thumb: a backward pass takes twice as long as a forward pass, and half of it
    is the gradient of the input. A packed pass over k microbatches takes k times as long as one.

    Attributes:
        forward: one microbatch through one stage (F).
        backward: its full backward (B).
        input_grad: the gradient of the stage's input alone (I).
        weight_grad: the gradient of the stage's weights alone (W).
        latency: from the end of an action until its message is there, on every link between the edge and a cloud
            rank. Links between cloud ranks take no time.

    Raises:
        ScheduleError: a time that is negative or not a finite number.
    """

    forward: Durations = 1.0
    backward: Durations = 2.0
    input_grad: Durations = 1.0
    weight_grad: Durations = 1.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for time in value if isinstance(value, tuple) else (value,):
                if not math.isfinite(time) or time < 0:
                    raise ScheduleError(f"{field.name} must be a finite time of 0 or more, got {time}")

    def check_fit(self, layout: Layout) -> None:
        """Raises ScheduleError when a tuple has not one duration for each stage of `layout`."""
        for name in ("forward", "backward", "input_grad", "weight_grad"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(layout.stages):
                raise ScheduleError(
                    f"{name} gives {len(value)} durations, but the layout has {len(layout.stages)} stages; give one "
                    "number for all stages, or one for each"
                )

    def duration(self, action: Action) -> float:
        """How long a compute action holds its rank."""
        per_stage = {
            Kind.F: self.forward,
            Kind.B: self.backward,
            Kind.I: self.input_grad,
            Kind.W: self.weight_grad,
        }[action.kind]
        one = per_stage[action.stage] if isinstance(per_stage, tuple) else per_stage
        return one * len(action.microbatches)

    def transfer(self, sender: int, receiver: int) -> float:
        """How long a message is under way between two pipeline ranks."""
        return self.latency if sender != receiver and EDGE_RANK in (sender, receiver) else 0.0
