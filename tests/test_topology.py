"""Ranks of two sites: edge first, each site numbered as megatron-core numbers its own world."""

from __future__ import annotations

import itertools

import pytest

from ldt_schedules.errors import ConfigError
from ldt_schedules.topology import Site, SiteSize, Topology

SIZES = [SiteSize(t, c, d) for t, c, d in itertools.product((1, 2), (1, 2), (1, 3))]


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_places_are_a_numbering_and_peers_hold_the_same_slice(ranks, size):
    topology = Topology(ranks, size, size)
    places = topology.places()
    assert [place.global_rank for place in places] == list(range(topology.total_processes))
    assert len({(p.pipeline_rank, p.tensor_rank, p.context_rank, p.data_rank) for p in places}) == len(places)
    for place in places:
        assert (place.site is Site.EDGE) == (place.pipeline_rank == 0)
        for pipeline_rank in range(ranks):
            peer = topology.place_of_global_rank(topology.peer(place, pipeline_rank))
            assert peer.pipeline_rank == pipeline_rank
            assert (peer.tensor_rank, peer.context_rank, peer.data_rank) == (
                place.tensor_rank,
                place.context_rank,
                place.data_rank,
            )


def test_an_edge_alone():
    topology = Topology(1)
    assert topology.total_processes == 1 and topology.places()[0].pipeline_rank == 0


def test_unequal_sites_are_refused_with_both_sizes():
    with pytest.raises(ConfigError, match=r"tensor=1.*tensor=2.*not supported yet"):
        Topology(2, SiteSize(1), SiteSize(2))
