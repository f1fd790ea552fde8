"""Which stage stands on which pipeline rank, and which stage feeds which.

A layout is a directed acyclic graph of stages. The U of layerwise-disaggregated training is a chain whose
two ends stand on the same rank, the edge:

    u(3)        stage 0 (head) ──► stage 1 ──► stage 2 ──► stage 3 (tail)
                rank 0 (edge)      rank 1      rank 2      rank 0 (edge)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ldt_schedules.planning.errors import ScheduleError

EDGE_RANK = 0

MAX_RANKS = 10_000
MAX_MICROBATCHES = 1_000_000
"""Far above any step; a slip like 10000000000 must not fill the memory."""

Edge = tuple[int, int, bool]
"""(stage, stage that reads its output, in this direction?): which way a value goes in the graph of stages."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A contiguous part of the model.

    `ranks` holds one pipeline rank, or one for each domain (a domain is one data-parallel pipeline of the
    cloud). `inputs` are the stages that feed this one.

    `label` is what the author of a grid calls the stage, None where that is the index; several roots may share one.

    `frozen`: no parameter of it is trained. Whether it then has a backward depends on what feeds it (`Layout.has_backward`).
    If it has, that is a backward as any other, a B or an I and a W. Only less is computed, which is for `Costs` to say: the
    gradient of the input, and nothing in W.
    """

    index: int
    name: str
    ranks: tuple[int, ...]
    inputs: tuple[int, ...]
    label: int | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.label == self.index:  # one stage is written in one way, so that equal layouts have equal files
            object.__setattr__(self, "label", None)

    @property
    def number(self) -> int:
        """The stage number in the cells of a grid."""
        return self.index if self.label is None else self.label


@dataclass(frozen=True)
class Layout:
    """Stages, `stages[i].index == i`, usually numbered in forward order.

    Microbatch `m` belongs to domain `m mod D`, or to `domain_of[m]` where that is given. `num_ranks` 0 stands for
    "as many as the stages use"; give it when some rank has nothing to do.

    Raises:
        ScheduleError: a stage with a wrong index, an input that does not exist, a cycle, no rank, a rank that does not
            exist, a gap in the rank numbers, more than `MAX_RANKS`, one number for two stages of a rank (`Stage.number`).
    """

    stages: tuple[Stage, ...]
    num_ranks: int = 0
    domain_of: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise ScheduleError("a layout needs at least one stage")
        for position, stage in enumerate(self.stages):
            if stage.index != position:
                raise ScheduleError(f"stage {stage.index} stands at position {position}; number stages 0, 1, 2, …")
            if not stage.ranks:
                raise ScheduleError(f"stage {position} stands on no rank")
            for source in stage.inputs:
                if not 0 <= source < len(self.stages):
                    raise ScheduleError(f"stage {position} takes its input from stage {source}, which does not exist")
        self._check_ranks()
        self._check_labels()
        if len({len(stage.ranks) for stage in self.stages} - {1}) > 1:
            raise ScheduleError("stages with one rank for each domain must all name the same number of ranks")
        for m, domain in enumerate(self.domain_of):
            if not 0 <= domain < self.num_domains:
                raise ScheduleError(
                    f"microbatch {m} is of domain {domain}; there are domains 0..{self.num_domains - 1}"
                )
        _ = self.forward_order  # refuses cycles

    def _check_ranks(self) -> None:
        used = {rank for stage in self.stages for rank in stage.ranks}
        if not self.num_ranks:
            if used != set(range(len(used))):
                raise ScheduleError(f"pipeline ranks must be 0..{len(used) - 1} without gaps, got {sorted(used)}")
            object.__setattr__(self, "num_ranks", len(used))
        _check_count(self.num_ranks)
        for stage in self.stages:
            for rank in stage.ranks:
                if not 0 <= rank < self.num_ranks:
                    raise ScheduleError(
                        f"stage {stage.index} stands on rank {rank}, which does not exist; ranks are "
                        f"0..{self.num_ranks - 1}"
                    )

    def _check_labels(self) -> None:
        known: dict[tuple[int, int], int] = {}
        for stage in self.stages:
            if stage.number < 0:
                raise ScheduleError(f"stage {stage.index} has the label {stage.label}; labels are 0, 1, 2, …")
            for rank in stage.ranks:
                before = known.setdefault((stage.number, rank), stage.index)
                if before != stage.index:
                    raise ScheduleError(
                        f"stages {before} and {stage.index} of rank {rank} are both called {stage.number}; give them "
                        "labels that differ, or none"
                    )

    def check_microbatches(self, num_microbatches: int) -> None:
        """Raises ScheduleError when a step of the layout cannot have so many microbatches."""
        if num_microbatches < 1:
            raise ScheduleError(f"a step needs at least 1 microbatch, got {num_microbatches}")
        if num_microbatches > MAX_MICROBATCHES:
            raise ScheduleError(
                f"a step has at most {MAX_MICROBATCHES} microbatches, got {num_microbatches}; give fewer"
            )
        if self.domain_of and len(self.domain_of) != num_microbatches:
            raise ScheduleError(f"domain_of has {len(self.domain_of)} entries for {num_microbatches} microbatches")

    @classmethod
    def alone(cls) -> Layout:
        """The whole model in one stage, on the edge."""
        return cls((Stage(0, "whole", (EDGE_RANK,), ()),))

    @classmethod
    def u(cls, num_ranks: int, domains: int = 1) -> Layout:
        """The U over `num_ranks` pipeline ranks: stages `0..P`, stage `s` on rank `s mod P`.

        With several domains the edge serves one cloud pipeline of P - 1 ranks for each of them.

        Raises:
            ScheduleError: fewer than 2 ranks (an edge alone is no pipeline), or no domain.
        """
        _check_count(num_ranks, domains)
        return cls._ring(num_ranks, ["head", *(f"cloud{rank}" for rank in range(1, num_ranks)), "tail"], domains)

    @classmethod
    def laps(cls, num_ranks: int, laps: int = 2, domains: int = 1) -> Layout:
        """The U walked `laps` times: stages `0..laps * P`, stage `s` on rank `s mod P`, the tail on the edge.

        laps(2)    V0 edge ──► V1 cloud ──► L2 edge ──► L3 cloud ──► T4 edge       (images, language, loss)

        Raises:
            ScheduleError: fewer than 2 ranks, no lap, or no domain.
        """
        if laps < 1:
            raise ScheduleError(f"a U has at least 1 lap, got {laps}")
        _check_count(num_ranks, domains, laps)
        names = [f"lap{s // num_ranks + 1}_{s % num_ranks}" for s in range(laps * num_ranks)]
        return cls._ring(num_ranks, [*names, "tail"], domains)

    @classmethod
    def _ring(cls, num_ranks: int, names: list[str], domains: int) -> Layout:
        if num_ranks < 2:
            raise ScheduleError(f"a U needs at least 2 pipeline ranks (an edge and a cloud), got {num_ranks}")
        if domains < 1:
            raise ScheduleError(f"a U has at least 1 domain, got {domains}")

        def ranks(stage: int) -> tuple[int, ...]:
            place = stage % num_ranks
            return tuple(place + d * (num_ranks - 1) for d in range(domains)) if place else (EDGE_RANK,)

        return cls(tuple(Stage(s, name, ranks(s), (s - 1,) if s else ()) for s, name in enumerate(names)))

    @classmethod
    def roots(cls, roots: Mapping[str, int], chain: Mapping[str, int]) -> Layout:
        """Stages that read data of different kinds, and the chain whose first stage joins what they make.

        roots({"audio": 0, "vision": 1, "text": 2}, {"join": 3, "middle": 4, "last": 5})

            audio  (rank 0) ──┐
            vision (rank 1) ──┼──► join (rank 3) ──► middle (rank 4) ──► last (rank 5)
            text   (rank 2) ──┘

        Ranks may hold several stages: roots({"audio": 0, "vision": 0}, {"head": 0, "cloud": 1, "tail": 0}) puts two
        encoders beside the head of a U. As labels all roots get 0 and the chain 1, 2, …, as people number them; there
        are no labels where two stages of a rank would share one.

        Args:
            roots, chain: the pipeline rank of each stage, by the stage's name.

        Raises:
            ScheduleError: no root, an empty chain, a name in both, or ranks that `Layout` refuses.
        """
        if not roots:
            raise ScheduleError(
                'there is no root; name each stage that reads data and its rank, for example {"text": 0}'
            )
        if not chain:
            raise ScheduleError('the chain is empty; name the stage that joins the roots and its rank: {"join": 1}')
        both = [name for name in roots if name in chain]
        if both:
            raise ScheduleError(f"{both[0]!r} is a root and a stage of the chain; give the two names that differ")
        places = [(0, rank) for rank in roots.values()] + list(enumerate(chain.values(), 1))
        labelled = len(set(places)) == len(places)
        stages = []
        for index, (name, (number, rank)) in enumerate(zip([*roots, *chain], places, strict=True)):
            inputs = () if number == 0 else tuple(range(len(roots))) if number == 1 else (index - 1,)
            stages.append(Stage(index, name, (rank,), inputs, number if labelled else None))
        return cls(tuple(stages))

    def freeze(self, stages: Collection[int]) -> Layout:
        """The same layout with just these stages frozen, and no others: `freeze(())` thaws all.

        All stages may be frozen: there is a step for that, the evaluation. A table that is to train them is refused.

        Raises:
            ScheduleError: there is no such stage.
        """
        missing = sorted(set(stages) - set(range(len(self.stages))))
        if missing:
            raise ScheduleError(f"there is no stage {missing[0]} to freeze; stages are 0..{len(self.stages) - 1}")
        return replace(self, stages=tuple(replace(stage, frozen=stage.index in stages) for stage in self.stages))

    def same_work(self, other: Layout) -> bool:
        """Do both have the same stages on the same ranks, connected alike, and a backward for the same of them? What they
        are called does not matter, nor what is frozen behind a stage that is trained."""
        mine, theirs = (
            [(s.ranks, set(s.inputs), layout.has_backward(s.index)) for s in layout.stages] for layout in (self, other)
        )
        return mine == theirs and self.num_ranks == other.num_ranks

    def rings(self, laps: int) -> list[tuple[int, ...]] | None:
        """For each domain the ranks that a U of so many laps goes round, the edge first; None: this is no such U."""
        num_places, rest = divmod(len(self.stages) - 1, laps)
        chain = all(stage.inputs == ((stage.index - 1,) if stage.index else ()) for stage in self.stages)
        if rest or num_places < 2 or not chain:
            return None
        rings = []
        for domain in range(self.num_domains):
            where = [stage.ranks[domain % len(stage.ranks)] for stage in self.stages]
            ring = tuple(where[:num_places])
            if ring[0] != EDGE_RANK or len(set(ring)) < num_places:
                return None
            if any(rank != ring[s % num_places] for s, rank in enumerate(where)):
                return None
            rings.append(ring)
        cloud = [rank for ring in rings for rank in ring[1:]]
        return rings if len(set(cloud)) == len(cloud) else None

    @cached_property
    def forward_order(self) -> tuple[int, ...]:
        """The stages so that every one comes after its inputs.

        Raises:
            ScheduleError: there is no such order; the message names the stages of the cycle.
        """
        order: list[int] = []
        missing = [len(set(stage.inputs)) for stage in self.stages]
        free = [stage for stage, inputs in enumerate(missing) if not inputs]
        while free:
            order += free
            ready = []
            for stage in (consumer for source in free for consumer in self._consumers[source]):
                missing[stage] -= 1
                if not missing[stage]:
                    ready.append(stage)
            free = sorted(ready)
        if len(order) < len(self.stages):
            rest = sorted({*range(len(self.stages))}.difference(order))
            raise ScheduleError(f"stages {rest} wait for each other: the graph of stages has a cycle")
        return tuple(order)

    @property
    def has_idle_ranks(self) -> bool:
        """Is there a rank without a stage?"""
        return len({rank for stage in self.stages for rank in stage.ranks}) < self.num_ranks

    @cached_property
    def num_domains(self) -> int:
        return max(len(stage.ranks) for stage in self.stages)

    @cached_property
    def _consumers(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.stages]
        for consumer in self.stages:
            for source in set(consumer.inputs):
                found[source].append(consumer.index)
        return tuple(map(tuple, found))

    def inputs(self, stage: int) -> tuple[int, ...]:
        """The stages whose outputs stage `stage` reads."""
        return self.stages[stage].inputs

    def consumers(self, stage: int) -> tuple[int, ...]:
        """The stages that read the output of stage `stage`."""
        return self._consumers[stage]

    @cached_property
    def _with_backward(self) -> frozenset[int]:
        found: set[int] = set()
        for stage in self.forward_order:
            if not self.stages[stage].frozen or not found.isdisjoint(self.inputs(stage)):
                found.add(stage)
        return frozenset(found)

    def has_backward(self, stage: int) -> bool:
        """Does anybody need a gradient there? Not where the stage is frozen and all that feeds it, near or far, is too.

            frozen ──► frozen ──► trained ──► frozen ──► trained        a frozen stage behind a trained one must pass the
              F          F          F B         F B        F B          gradient on

        So all that a stage with a backward feeds has one too.
        """
        return stage in self._with_backward

    @property
    def is_trained(self) -> bool:
        """Is there anything to train?"""
        return bool(self._with_backward)

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The pipeline rank that runs `stage` for `microbatch`."""
        ranks = self.stages[stage].ranks
        return ranks[self.domain(microbatch)] if len(ranks) > 1 else ranks[0]

    def domain(self, microbatch: int) -> int:
        """The domain that `microbatch` belongs to."""
        return self.domain_of[microbatch] if self.domain_of else microbatch % self.num_domains

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """The stages that stand on pipeline rank `rank`, in forward order."""
        return tuple(stage for stage in self.forward_order if rank in self.stages[stage].ranks)

    def is_head(self, stage: int) -> bool:
        """Does the stage read the data (it has no input)?"""
        return not self.stages[stage].inputs

    def is_tail(self, stage: int) -> bool:
        """Does the stage compute the loss (nothing reads its output)?"""
        return not self._consumers[stage]

    def neighbours_on(self, stages: tuple[int, ...], rank: int, microbatch: int) -> list[int]:
        """Those of `stages` that run `microbatch` on `rank`."""
        return [stage for stage in stages if self.rank_of(stage, microbatch) == rank]


def _check_count(num_ranks: int, domains: int = 1, laps: int = 1) -> None:
    """Raises ScheduleError for more ranks, or stages on a rank, than anybody can mean."""
    if num_ranks > MAX_RANKS or num_ranks * max(domains, laps) > MAX_RANKS:
        times = "".join(f" x {n} {what}" for n, what in ((domains, "domains"), (laps, "laps")) if n > 1)
        raise ScheduleError(f"a pipeline has at most {MAX_RANKS} ranks, those of all domains, got {num_ranks}{times}")
