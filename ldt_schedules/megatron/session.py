"""What one process knows of the run it is part of.

Megatron's forward-backward contract has no room for a link or a schedule, so there is one session for each process,
as Megatron has one `parallel_state`. Without a session every patched function answers as Megatron's own does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

from ldt_schedules.comm.link import Link
from ldt_schedules.comm.transport import Transport
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.recorder import StepRecorder
from ldt_schedules.topology import Place, Topology

TableSource = Callable[[int, bool], ScheduleTable]
"""`(num_microbatches, forward_only) -> table`; every process gets the same one."""


@dataclass
class Session:
    """The run as one process sees it.

    Attributes:
        table_for: the schedule of a step.
        steps: forward-backward calls so far; equal on both sites.
        executing: the stage being computed right now, None between actions.
        last_step: times of the latest step.
    """

    topology: Topology
    place: Place
    link: Link
    transport: Transport
    table_for: TableSource
    steps: int = 0
    executing: int | None = None
    last_step: StepRecorder = field(default_factory=StepRecorder)

    def __post_init__(self) -> None:
        self.table_for = lru_cache(maxsize=8)(self.table_for)

    @contextmanager
    def stage(self, stage: int) -> Iterator[None]:
        """While inside, Megatron's stage predicates answer for `stage`."""
        before, self.executing = self.executing, stage
        try:
            yield
        finally:
            self.executing = before


_current: Session | None = None


def install(session: Session) -> None:
    """Make `session` this process's; the patched functions use it from now on."""
    global _current
    _current = session


def uninstall() -> None:
    """Forget the session; the patched functions answer as Megatron's own again."""
    global _current
    _current = None


def current() -> Session | None:
    """The session of this process; None outside a U (an edge alone, a plain Megatron run)."""
    return _current
