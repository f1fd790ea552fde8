"""Who is where: sites, their parallel sizes, and which process exchanges which part of a tensor with which other.

Edge processes come first in the global numbering, then the cloud's. Inside a site a process is numbered as
megatron-core numbers it (order tp-cp-dp-pp), so `site_rank` is its rank in the site's own torch.distributed world:

    edge 1x1x1, cloud of 2 stages        global rank 0        1            2
                                         site        edge     cloud        cloud
                                         pipeline    rank 0   rank 1       rank 2

**Domains.** The cloud may have D times as many replicas as the edge (MindSpeed: VDP). Then each edge replica serves D
pipelines of the cloud, its domains, in turn, and microbatch j of the edge replica belongs to domain j mod D. Megatron
deals microbatch n of the global batch to replica n mod dp on either site, so edge replica e and domain d are joined to
the cloud replica d * dp_e + e, and both sites see the same global batch. The schedule table counts every domain's ranks:

    P = 3, D = 2      pipeline ranks of the table:  0 (edge)    1, 2 (domain 0)    3, 4 (domain 1)
    dp_e = 2, dp_c = 4                edge replica 0 ── cloud replicas 0, 2        edge replica 1 ── 1, 3

**Routes.** The sites may differ in tensor-parallel size (MindSpeed: VTP). At the boundary one copy of `[s, b, h]` is
cut along s. In mode *slices* each process owns the part that its rank in the tensor-parallel group stands for, and
sends it to those whose parts overlap:

    tp 2 to tp 3      sender    |     0     |     1     |          0 ─► 0, 1      1 ─► 1, 2
                      receiver  |   0   |   1   |   2   |

In mode *lead* rank 0 of each group owns all of it. What the groups do before and after is in `comm/boundary.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from ldt_schedules.errors import ConfigError


class Site(str, Enum):
    """The two sides of the link."""

    EDGE = "edge"
    CLOUD = "cloud"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class SiteSize:
    """Parallel sizes of one site; its pipeline size is 1 at the edge and P - 1 in the cloud.

    With `sequence_parallel` the tensor-parallel processes hold their part of each activation, else all hold all of it.
    """

    tensor: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False

    @property
    def replicas(self) -> int:
        """Processes for each pipeline rank."""
        return self.tensor * self.context * self.data


@dataclass(frozen=True, slots=True)
class Place:
    """Where one process stands.

    Attributes:
        pipeline_rank: its row in the schedule table.
        stage: the stage it holds; 0 at the edge, which holds the last one too.
        domain: which of its edge replica's domains it works for; 0 at the edge, which works for all.
    """

    site: Site
    site_rank: int
    global_rank: int
    pipeline_rank: int
    stage: int
    domain: int
    tensor_rank: int
    context_rank: int
    data_rank: int

    def __str__(self) -> str:
        return f"{self.name} (pipeline rank {self.pipeline_rank})"

    @property
    def name(self) -> str:
        """Of the process: `cloud rank 1`, as its site counts."""
        return f"{self.site} rank {self.site_rank}"


@dataclass(frozen=True, slots=True)
class Piece:
    """What is exchanged with process `global_rank`: the part from `start / parts` to `stop / parts` of a sequence."""

    global_rank: int
    start: int
    stop: int
    parts: int

    def bounds(self, length: int) -> tuple[int, int]:
        """The same in positions of a sequence of `length`, which `parts` divides."""
        return self.start * length // self.parts, self.stop * length // self.parts


@dataclass(frozen=True)
class Topology:
    """Both sites. `num_pipeline_ranks` is P, the edge counted, domains not.

    Raises:
        ConfigError: sizes below 1; context sizes that differ; a cloud whose replicas are no multiple of the edge's.
    """

    num_pipeline_ranks: int
    edge: SiteSize = SiteSize()
    cloud: SiteSize = SiteSize()

    def __post_init__(self) -> None:
        sizes = [self.num_pipeline_ranks]
        sizes += [n for site in (self.edge, self.cloud) for n in (site.tensor, site.context, site.data)]
        if min(sizes) < 1:
            raise ConfigError(f"every parallel size must be at least 1, got {self}")
        if self.num_pipeline_ranks == 1:
            return
        if self.edge.context != self.cloud.context:
            raise ConfigError(
                f"the edge's context parallel size is {self.edge.context} and the cloud's {self.cloud.context}; they "
                "must be equal, because the two sites would cut the sequence at different places"
            )
        if self.cloud.data % self.edge.data:
            raise ConfigError(
                f"the cloud's data parallel size {self.cloud.data} is not a multiple of the edge's {self.edge.data}; "
                f"give the cloud {nearest_multiples(self.cloud.data, self.edge.data)}, or the edge a divisor of "
                f"{self.cloud.data}"
            )

    @property
    def domains(self) -> int:
        """D: cloud pipelines for each edge replica."""
        return 1 if self.num_pipeline_ranks == 1 else self.cloud.data // self.edge.data

    def size(self, site: Site) -> SiteSize:
        return self.edge if site is Site.EDGE else self.cloud

    def pipeline_size(self, site: Site) -> int:
        """The site's own pipeline-model-parallel size."""
        return 1 if site is Site.EDGE else self.num_pipeline_ranks - 1

    def world_size(self, site: Site) -> int:
        """Processes of the site."""
        return self.size(site).replicas * self.pipeline_size(site)

    @property
    def total_processes(self) -> int:
        return self.world_size(Site.EDGE) + (self.world_size(Site.CLOUD) if self.num_pipeline_ranks > 1 else 0)

    def place(self, site: Site, site_rank: int) -> Place:
        """Where rank `site_rank` of the site's world stands."""
        size = self.size(site)
        in_stage, position = site_rank % size.replicas, site_rank // size.replicas
        data_rank = in_stage // (size.tensor * size.context)
        is_edge = site is Site.EDGE
        domain = 0 if is_edge else data_rank // self.edge.data
        return Place(
            site=site,
            site_rank=site_rank,
            global_rank=site_rank + (0 if is_edge else self.world_size(Site.EDGE)),
            pipeline_rank=0 if is_edge else 1 + position + domain * (self.num_pipeline_ranks - 1),
            stage=0 if is_edge else 1 + position,
            domain=domain,
            tensor_rank=in_stage % size.tensor,
            context_rank=in_stage // size.tensor % size.context,
            data_rank=data_rank,
        )

    def place_of_global_rank(self, global_rank: int) -> Place:
        """The same for a number that counts both sites, edge first."""
        edge = self.world_size(Site.EDGE)
        if global_rank < edge:
            return self.place(Site.EDGE, global_rank)
        return self.place(Site.CLOUD, global_rank - edge)

    def places(self) -> list[Place]:
        """Every process, by global rank."""
        return [self.place_of_global_rank(rank) for rank in range(self.total_processes)]

    def edge_replica(self, place: Place) -> int:
        """The data rank of the edge process that `place` works with."""
        return place.data_rank % self.edge.data

    def peers(self, place: Place, pipeline_rank: int) -> list[int]:
        """The global ranks at `pipeline_rank` that hold the same part of the batch as `place`, by tensor rank.

        Raises:
            AssertionError: the rank is of another domain, which no table asks for.
        """
        replica = self.edge_replica(place)
        if pipeline_rank == 0:
            first = self.edge.tensor * (place.context_rank + self.edge.context * replica)
            return list(range(first, first + self.edge.tensor))
        domain, position = divmod(pipeline_rank - 1, self.num_pipeline_ranks - 1)
        assert place.site is Site.EDGE or domain == place.domain, f"{place} has no peer at {pipeline_rank}"
        data_rank = domain * self.edge.data + replica
        first = self.cloud.tensor * (place.context_rank + self.cloud.context * data_rank)
        first += self.world_size(Site.EDGE) + position * self.cloud.replicas
        return list(range(first, first + self.cloud.tensor))

    def crosses(self, place: Place, pipeline_rank: int) -> bool:
        """Is that pipeline rank on the other site?"""
        return (place.site is Site.EDGE) != (pipeline_rank == 0)

    def pieces(self, place: Place, pipeline_rank: int, lead: bool = False) -> list[Piece]:
        """What this process exchanges with a pipeline rank of the other site, in the order of the sequence.

        The same pieces go out with an activation and come in with its gradient. Together the pieces of all pairs of
        processes are one copy of the tensor.

        Args:
            lead: the first process of each tensor-parallel group stands for all of it.
        """
        peers = self.peers(place, pipeline_rank)
        if lead:
            return [Piece(peers[0], 0, 1, 1)] if place.tensor_rank == 0 else []
        parts = self.parts
        mine = _share(place.tensor_rank, self.size(place.site).tensor, parts)
        pieces = []
        for tensor_rank, global_rank in enumerate(peers):
            theirs = _share(tensor_rank, len(peers), parts)
            start, stop = max(mine[0], theirs[0]), min(mine[1], theirs[1])
            if start < stop:
                pieces.append(Piece(global_rank, start, stop, parts))
        return pieces

    @property
    def parts(self) -> int:
        """Of a sequence that can be cut for the processes of both sites: a length that this divides."""
        return math.lcm(self.edge.tensor, self.cloud.tensor)


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`, in words: "4 or 6"."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def _share(rank: int, size: int, parts: int) -> tuple[int, int]:
    return rank * parts // size, (rank + 1) * parts // size
