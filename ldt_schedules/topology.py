"""Who is where: sites, their parallel sizes, and which process talks to which across a pipeline link.

Edge processes come first in the global numbering, then the cloud's. Inside a site a process is numbered as
megatron-core numbers it (order tp-cp-dp-pp), so `site_rank` is its rank in the site's own torch.distributed world:

    edge 1x1x1, cloud of 2 pipeline ranks    global rank 0        1            2
                                             site        edge     cloud        cloud
                                             pipeline    rank 0   rank 1       rank 2
"""

from __future__ import annotations

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
    """Parallel sizes of one site; its pipeline size is 1 at the edge and P - 1 in the cloud."""

    tensor: int = 1
    context: int = 1
    data: int = 1

    @property
    def replicas(self) -> int:
        """Processes for each pipeline rank."""
        return self.tensor * self.context * self.data


@dataclass(frozen=True, slots=True)
class Place:
    """Where one process stands."""

    site: Site
    site_rank: int
    global_rank: int
    pipeline_rank: int
    tensor_rank: int
    context_rank: int
    data_rank: int

    def __str__(self) -> str:
        return f"{self.site} rank {self.site_rank} (pipeline rank {self.pipeline_rank})"


@dataclass(frozen=True)
class Topology:
    """Both sites. `num_pipeline_ranks` is P, the edge counted.

    Raises:
        ConfigError: sizes below 1, or sites of unequal tensor, context or data size.
    """

    num_pipeline_ranks: int
    edge: SiteSize = SiteSize()
    cloud: SiteSize = SiteSize()

    def __post_init__(self) -> None:
        sizes = [self.num_pipeline_ranks]
        sizes += [n for site in (self.edge, self.cloud) for n in (site.tensor, site.context, site.data)]
        if min(sizes) < 1:
            raise ConfigError(f"every parallel size must be at least 1, got {self}")
        if self.num_pipeline_ranks > 1 and self.edge != self.cloud:
            raise ConfigError(
                f"edge {self.edge} and cloud {self.cloud} differ; sites of unequal tensor, context or data parallel "
                "size are not supported yet: give both sites the same sizes"
            )

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
        in_stage, pipeline = site_rank % size.replicas, site_rank // size.replicas
        return Place(
            site=site,
            site_rank=site_rank,
            global_rank=site_rank + (0 if site is Site.EDGE else self.world_size(Site.EDGE)),
            pipeline_rank=pipeline if site is Site.EDGE else pipeline + 1,
            tensor_rank=in_stage % size.tensor,
            context_rank=in_stage // size.tensor % size.context,
            data_rank=in_stage // (size.tensor * size.context),
        )

    def place_of_global_rank(self, global_rank: int) -> Place:
        """The same for a number that counts both sites, edge first."""
        edge = self.world_size(Site.EDGE)
        if global_rank < edge:
            return self.place(Site.EDGE, global_rank)
        return self.place(Site.CLOUD, global_rank - edge)

    def peer(self, place: Place, pipeline_rank: int) -> int:
        """The global rank at pipeline rank `pipeline_rank` that holds the same slice of the tensor as `place`."""
        size = self.size(place.site)
        in_stage = place.tensor_rank + size.tensor * (place.context_rank + size.context * place.data_rank)
        if pipeline_rank == 0:
            return in_stage
        return self.world_size(Site.EDGE) + (pipeline_rank - 1) * size.replicas + in_stage

    def places(self) -> list[Place]:
        """Every process, by global rank."""
        return [self.place_of_global_rank(rank) for rank in range(self.total_processes)]
