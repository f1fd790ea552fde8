"""What one process knows of the run it is part of.

Megatron's forward-backward contract has no room for a link or a schedule, so there is one session for each process,
as Megatron has one `parallel_state`. Without a session every patched function answers as Megatron's own does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ldt_schedules.comm.boundary import BoundaryTransport
from ldt_schedules.comm.ledger_file import LedgerFile
from ldt_schedules.comm.link import Link
from ldt_schedules.megatron.two_phases import Phase
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.microbatch_format import MicrobatchFormat
from ldt_schedules.runtime.recorder import StepRecorder
from ldt_schedules.topology import Place, Site, Topology

TableSource = Callable[[int, bool], ScheduleTable]
"""`(num_microbatches, forward_only) -> table`; every process gets the same one."""


@dataclass
class Session:
    """The run as one process sees it.

    Attributes:
        table_for: the schedule of a step of the edge, whose microbatches are those of all its domains.
        ledger: of what crosses between the sites; None: it is not kept.
        microbatch_format: of a model whose stages do not all exchange `[s, b, h]`; None: they do.
        steps: forward-backward calls so far; equal on both sites.
        exchanges: of `agreement.exchange` so far; equal on both sites.
        domain_scale: what the cloud's averaged gradients are multiplied by, see `grad_sync.scale_to_global_batch`.
        layout: of the step that runs or ran last; None before the first.
        executing: the stage being computed right now, None between actions.
        last_step: times of the latest step.
        phase: of the optimizer's step, see `two_phases`.
        agreed: hash of what both sites agreed on at start.
    """

    topology: Topology
    place: Place
    link: Link
    transport: BoundaryTransport
    table_for: TableSource
    ledger: LedgerFile | None = None
    microbatch_format: MicrobatchFormat | None = None
    steps: int = 0
    exchanges: int = 0
    domain_scale: float = field(init=False)
    layout: Layout | None = None
    executing: int | None = None
    last_step: StepRecorder = field(default_factory=StepRecorder)
    phase: Phase = Phase.COMPUTING
    agreed: str = ""

    def __post_init__(self) -> None:
        self.table_for = lru_cache(maxsize=8)(self.table_for)
        self.domain_scale = float(self.topology.domains)

    def table(self, num_microbatches: int, forward_only: bool) -> ScheduleTable:
        """The table of a step in which this process runs `num_microbatches`: its site's, as Megatron counts them.

        The edge runs those of all its domains.
        """
        domains = 1 if self.place.site is Site.EDGE else self.topology.domains
        table = self.table_for(num_microbatches * domains, forward_only)
        self.layout = table.layout
        return table

    def local_microbatch(self, microbatch: int) -> int:
        """The number that Megatron gives a microbatch of the table in this process: it counts its own, from 0."""
        return microbatch if self.place.site is Site.EDGE else microbatch // self.topology.domains

    def from_edge(self, what: str, message: dict[str, Any]) -> dict[str, Any]:
        """The edge's message about this step, on both sites: the edge gives its own, the cloud waits for it.

        Each slice of the batch (context rank and edge replica) has its own; the slice's first tensor-parallel rank
        speaks.
        """
        key = f"{what}/{self.steps}/{self.place.context_rank}/{self.topology.edge_replica(self.place)}"
        if self.place.site is not Site.EDGE:
            reads = "" if self.microbatch_format is None else ", before which it reads all its batches"
            return self.link.fetch(key, f"the edge's {what} of step {self.steps}{reads}")
        if self.place.tensor_rank == 0:
            self.link.publish(key, message)
            # That the edge is at this step proves that the cloud has read what belonged to the last but one.
            self.link.forget(key.replace(f"/{self.steps}/", f"/{self.steps - 2}/", 1))
        return message

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
