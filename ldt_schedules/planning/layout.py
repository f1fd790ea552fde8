"""Which stage stands on which pipeline rank, and which stage feeds which.

A layout is a directed acyclic graph of stages. The U of layerwise-disaggregated training is a chain whose
two ends stand on the same rank, the edge:

    u(3)        stage 0 (head) ──► stage 1 ──► stage 2 ──► stage 3 (tail)
                rank 0 (edge)      rank 1      rank 2      rank 0 (edge)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ldt_schedules.planning.errors import ScheduleError

EDGE_RANK = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """A contiguous part of the model.

    `ranks` holds one pipeline rank, or one for each domain (a domain is one data-parallel pipeline of the
    cloud): microbatch `m` runs on `ranks[m % len(ranks)]`. `inputs` are the stages that feed this one.
    """

    index: int
    name: str
    ranks: tuple[int, ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Stages in forward order, `stages[i].index == i`.

    Raises:
        ScheduleError: a stage with a wrong index, an input that does not come before its consumer (a cycle),
            no rank, a gap in the rank numbers, or two neighbours that a peer alone cannot tell apart.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        for position, stage in enumerate(self.stages):
            if stage.index != position:
                raise ScheduleError(f"stage {stage.index} stands at position {position}; number stages 0, 1, 2, …")
            if not stage.ranks:
                raise ScheduleError(f"stage {position} stands on no rank")
            for source in stage.inputs:
                if not 0 <= source < position:
                    raise ScheduleError(
                        f"stage {position} takes its input from stage {source}, which does not come before it"
                    )
        if not self.stages:
            raise ScheduleError("a layout needs at least one stage")
        used = {rank for stage in self.stages for rank in stage.ranks}
        if used != set(range(len(used))):
            raise ScheduleError(f"pipeline ranks must be 0..{len(used) - 1} without gaps, got {sorted(used)}")
        if len({len(stage.ranks) for stage in self.stages} - {1}) > 1:
            raise ScheduleError("stages with one rank for each domain must all name the same number of ranks")
        self._check_peers_name_one_edge()

    def _check_peers_name_one_edge(self) -> None:
        for stage in self.stages:
            for neighbours in (stage.inputs, self.consumers(stage.index)):
                for domain in range(self.num_domains):
                    ranks = [self.rank_of(neighbour, domain) for neighbour in neighbours]
                    if len(set(ranks)) != len(ranks):
                        raise ScheduleError(
                            f"stage {stage.index} has two neighbours on one rank ({ranks}), so the peer of a SEND "
                            "or RECV would not say which is meant; put them on different ranks"
                        )

    @classmethod
    def u(cls, num_ranks: int) -> Layout:
        """The U over `num_ranks` pipeline ranks: stages `0..P`, stage `s` on rank `s mod P`.

        Raises:
            ScheduleError: fewer than 2 ranks (an edge alone is no pipeline).
        """
        if num_ranks < 2:
            raise ScheduleError(f"a U needs at least 2 pipeline ranks (an edge and a cloud), got {num_ranks}")
        names = ["head", *(f"cloud{rank}" for rank in range(1, num_ranks)), "tail"]
        return cls(
            tuple(
                Stage(index=s, name=name, ranks=(s % num_ranks,), inputs=(s - 1,) if s else ())
                for s, name in enumerate(names)
            )
        )

    @cached_property
    def num_ranks(self) -> int:
        return len({rank for stage in self.stages for rank in stage.ranks})

    @cached_property
    def num_domains(self) -> int:
        return max(len(stage.ranks) for stage in self.stages)

    @cached_property
    def _consumers(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(consumer.index for consumer in self.stages if stage.index in consumer.inputs) for stage in self.stages
        )

    def inputs(self, stage: int) -> tuple[int, ...]:
        """The stages whose outputs stage `stage` reads."""
        return self.stages[stage].inputs

    def consumers(self, stage: int) -> tuple[int, ...]:
        """The stages that read the output of stage `stage`."""
        return self._consumers[stage]

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The pipeline rank that runs `stage` for `microbatch`."""
        ranks = self.stages[stage].ranks
        return ranks[microbatch % len(ranks)]

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """The stages that stand on pipeline rank `rank`, in forward order."""
        return tuple(stage.index for stage in self.stages if rank in stage.ranks)

    def is_head(self, stage: int) -> bool:
        """Does the stage read the data (it has no input)?"""
        return not self.stages[stage].inputs

    def is_tail(self, stage: int) -> bool:
        """Does the stage compute the loss (nothing reads its output)?"""
        return not self._consumers[stage]

    def neighbour_on(self, stages: tuple[int, ...], rank: int, microbatch: int) -> int | None:
        """The one of `stages` that runs `microbatch` on `rank`; None when none does."""
        for stage in stages:
            if self.rank_of(stage, microbatch) == rank:
                return stage
        return None
