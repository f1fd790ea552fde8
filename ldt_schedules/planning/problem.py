"""A scheduling problem: what is to be done, what it costs, and how much each rank can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.costs import Costs
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout

MEMORY_SLACK = 1e-9
"""Caps are met up to this much: sums of measured floats do not come out even."""


@dataclass(frozen=True)
class Problem:
    """One training step.

    `memory_cap` has one entry for each rank, in the unit of `costs.memory`; None there: no limit; empty: none anywhere.

    Raises:
        ScheduleError: no microbatch; costs that do not fit the layout; a cap that is negative, or below what one
            microbatch needs (the message has the number).
    """

    layout: Layout
    num_microbatches: int
    costs: Costs = field(default_factory=Costs)
    memory_cap: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        self.layout.check_microbatches(self.num_microbatches)
        self.costs.check_fit(self.layout, self.num_microbatches)
        if self.memory_cap and len(self.memory_cap) != self.layout.num_ranks:
            raise ScheduleError(f"mem_cap has {len(self.memory_cap)} entries for {self.layout.num_ranks} ranks")
        for rank in range(self.layout.num_ranks):
            self._check_cap(rank)

    def _check_cap(self, rank: int) -> None:
        domains = {self.layout.domain(m) for m in range(self.num_microbatches)}
        least = max(self._one_microbatch(rank, domain) for domain in domains)
        cap = self.cap(rank)
        if cap < 0 or math.isnan(cap):
            raise ScheduleError(f"the memory of rank {rank} must be 0 or more, got {cap:g}")
        if not self.allows(rank, least):
            stages = ", ".join(f"stage {s} {self.held(s):g}" for s in self.layout.stages_on(rank))
            raise ScheduleError(
                f"rank {rank} may hold {cap:g}, but a single microbatch in flight needs {least:g} there ({stages}); "
                f"give rank {rank} at least {least:g}"
            )

    def _one_microbatch(self, rank: int, domain: int) -> float:
        """The least a single microbatch holds on `rank` at its peak: a stage runs while all stages before it are held,
        wherever it stands itself."""
        members = {s.index for s in self.layout.stages if s.ranks[domain % len(s.ranks)] == rank}
        behind: dict[int, frozenset[int]] = {}
        for stage in self.layout.forward_order:
            behind[stage] = frozenset((stage,)).union(*(behind[source] for source in self.layout.inputs(stage)))
        return max(sum(self.held(s) for s in stages & members) for stages in behind.values())

    def held(self, stage: int) -> float:
        """What one microbatch of `stage` holds from the start of F: nothing where no backward will ask for it."""
        return self.costs.held(stage) if self.layout.has_backward(stage) else 0.0

    def cap(self, rank: int) -> float:
        """What `rank` may hold; infinite where there is no limit."""
        cap = self.memory_cap[rank] if self.memory_cap else None
        return math.inf if cap is None else cap

    def allows(self, rank: int, amount: float) -> bool:
        """May `rank` hold so much?"""
        return amount <= self.cap(rank) + MEMORY_SLACK

    def with_caps(self, caps: tuple[float | None, ...]) -> Problem:
        """The same problem with other memory."""
        return replace(self, memory_cap=caps)

    @cached_property
    def is_uniform(self) -> bool:
        """Do all microbatches of a stage take the same time?"""
        forward = all(self.costs.is_uniform(Kind.F, stage.index) for stage in self.layout.stages)
        return forward and all(
            self.costs.is_uniform(kind, s) for kind in (Kind.B, Kind.I, Kind.W) for s in self._with_backward
        )

    @property
    def _with_backward(self) -> list[int]:
        return [stage.index for stage in self.layout.stages if self.layout.has_backward(stage.index)]

    @property
    def can_split(self) -> bool:
        """Can some stage do I and W?"""
        return any(self.costs.can(Kind.I, stage) for stage in self._with_backward)

    @property
    def can_fuse(self) -> bool:
        """Can every stage do B, as far as it has a backward?"""
        return all(self.costs.can(Kind.B, stage) for stage in self._with_backward)
