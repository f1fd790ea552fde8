"""Both sites, from the flags and from how many processes there are; and which of them this process is.

A site is declared, never guessed: by `--ldt-site`, or, where one launcher starts both, by the number of the edge's
processes, which come first.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron_lm.flags import Flags
from ldt_schedules.topology import Place, Site, SiteSize, Topology, nearest_multiples


@dataclass(frozen=True)
class Sites:
    """What is known before Megatron starts.

    Attributes:
        together: one launcher has started the processes of both sites.
    """

    flags: Flags
    topology: Topology
    place: Place
    together: bool


def sites(flags: Flags, rank: int, world_size: int) -> Sites:
    """Find the sites and this process's place.

    Args:
        rank, world_size: RANK and WORLD_SIZE as the user's launcher has set them.

    Raises:
        ConfigError: process counts that do not fit the parallel sizes; each site's own view is printed.
    """
    if flags.site is None:
        return _together(flags, rank, world_size)
    return _apart(flags, flags.site, rank, world_size)


def _together(flags: Flags, rank: int, world_size: int) -> Sites:
    edge = flags.edge_world_size or _of_a_replica(flags, Site.EDGE)
    if flags.cloud_world_size not in (None, world_size - edge):
        raise ConfigError(
            f"--ldt-cloud-world-size is {flags.cloud_world_size}, but {world_size} processes were started and "
            f"{edge} of them are the edge's, which leaves {world_size - edge}; leave it out, or start the sites apart"
        )
    topology = _topology(flags, edge, world_size - edge)
    return Sites(flags, topology, topology.place_of_global_rank(rank), together=True)


def _apart(flags: Flags, site: Site, rank: int, world_size: int) -> Sites:
    if flags.link is None:
        raise ConfigError(
            f"--ldt-site {site} launches one site alone, so it must be told where the other is: give both sites "
            "--ldt-link HOST:PORT, a port on which the cloud's first process can be reached"
        )
    declared = {Site.EDGE: flags.edge_world_size, Site.CLOUD: flags.cloud_world_size}
    if declared[site] not in (None, world_size):
        raise ConfigError(
            f"--ldt-{site}-world-size is {declared[site]}, but the {site} was launched with {world_size} processes; "
            "change one of them"
        )
    other = Site.CLOUD if site is Site.EDGE else Site.EDGE
    replicas = _replicas(flags, site, world_size)
    counts = {site: world_size, other: declared[other] or replicas * _of_a_replica(flags, other)}
    topology = _topology(flags, counts[Site.EDGE], counts[Site.CLOUD])
    return Sites(flags, topology, topology.place(site, rank), together=False)


def _topology(flags: Flags, edge: int, cloud: int) -> Topology:
    def size(site: Site, world_size: int) -> SiteSize:
        tensor = _tensor(flags, site)
        return SiteSize(
            tensor=tensor,
            context=flags.context_size,
            data=_replicas(flags, site, world_size),
            # Megatron turns sequence parallelism off where there is one tensor-parallel process.
            sequence_parallel=flags.sequence_parallel and tensor > 1,
        )

    return Topology(flags.pipeline_ranks, size(Site.EDGE, edge), size(Site.CLOUD, cloud))


def _replicas(flags: Flags, site: Site, world_size: int) -> int:
    """Data-parallel replicas of a site."""
    needed = _of_a_replica(flags, site)
    if world_size < 1 or world_size % needed:
        raise ConfigError(
            f"the {site} has {world_size} processes, but a replica of its part of the model takes {needed} "
            f"({_view(flags, site)}): give it {nearest_multiples(world_size, needed)}.\n  "
            + "\n  ".join(f"{one}: {_view(flags, one)}" for one in Site)
        )
    return world_size // needed


def _of_a_replica(flags: Flags, site: Site) -> int:
    return _tensor(flags, site) * flags.context_size * _stages(flags, site)


def _tensor(flags: Flags, site: Site) -> int:
    return flags.edge_tensor_size if site is Site.EDGE else flags.cloud_tensor_size


def _stages(flags: Flags, site: Site) -> int:
    return 1 if site is Site.EDGE else flags.pipeline_ranks - 1


def _view(flags: Flags, site: Site) -> str:
    return f"TP {_tensor(flags, site)} x context {flags.context_size} x pipeline {_stages(flags, site)}"
