"""When each action of a step began and ended on this rank, and how long it waited for its inputs.

An accelerator computes behind the program's back, so its times are events on the compute stream, read when the step
is over.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ldt_schedules import device
from ldt_schedules.planning.actions import Action


@dataclass
class StepRecorder:
    """One step of one rank. `compute` holds (action, start, end) in order; `waited_s` is time without work.

    `started_s` is when the step began, on the clock that machines share (seconds since 1970); everything else is
    measured by clocks that only run forward.
    """

    compute: list[tuple[Action, Any, Any]] = field(default_factory=list)
    waited_s: float = 0.0
    step_s: float = 0.0
    started_s: float = 0.0
    _origin: Any = None

    @contextlib.contextmanager
    def computing(self, action: Action) -> Iterator[None]:
        start = device.timestamp()
        yield
        self.compute.append((action, start, device.timestamp()))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - start

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self.started_s, self._origin = time.time(), device.timestamp()
        start = time.perf_counter()
        yield
        self.step_s = time.perf_counter() - start

    def busy_s(self) -> float:
        """Seconds spent in F, B, I and W."""
        return sum(device.seconds_between(start, end) for _, start, end in self.compute)

    def spans_s(self) -> list[tuple[Action, float, float]]:
        """Each computation with its start and end, seconds since the step began."""
        return [
            (action, device.seconds_between(self._origin, start), device.seconds_between(self._origin, end))
            for action, start, end in self.compute
        ]
