"""Ranks of two sites: edge first, each site numbered as megatron-core numbers its own world; who talks to whom."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.topology import Site, SiteSize, Topology

TOPOLOGIES = [
    Topology(ranks, SiteSize(edge_tensor, context, edge_data), SiteSize(cloud_tensor, context, edge_data * domains))
    for ranks in (2, 3, 4)
    for edge_tensor, cloud_tensor in itertools.product((1, 2, 3, 4), (1, 2, 4))
    for context in (1, 2)
    for edge_data, domains in itertools.product((1, 2), (1, 2, 3))
]


def neighbours(topology, place):
    """The pipeline ranks that the table lets `place` send to: its neighbours in the U of its domain."""
    layout = Layout.u(topology.num_pipeline_ranks, topology.domains)
    for domain in range(topology.domains):
        if place.site is Site.EDGE or domain == place.domain:
            ring = [layout.rank_of(stage, domain) for stage in range(topology.num_pipeline_ranks + 1)]
            for left, right in itertools.pairwise(ring):
                if place.pipeline_rank in (left, right):
                    yield right if place.pipeline_rank == left else left


def test_places_are_a_numbering():
    for topology in TOPOLOGIES:
        places = topology.places()
        assert [place.global_rank for place in places] == list(range(topology.total_processes))
        kinds = {(p.pipeline_rank, p.tensor_rank, p.context_rank, topology.edge_replica(p)) for p in places}
        assert len(kinds) == len(places)
        layout = Layout.u(topology.num_pipeline_ranks, topology.domains)
        assert {place.pipeline_rank for place in places} == set(range(layout.num_ranks))
        for place in places:
            assert (place.site is Site.EDGE) == (place.pipeline_rank == 0)
            assert place.pipeline_rank == layout.rank_of(place.stage, place.domain)


def test_peers_hold_the_same_part_of_the_batch_and_name_each_other():
    for topology in TOPOLOGIES:
        for place in topology.places():
            for pipeline_rank in neighbours(topology, place):
                peers = [topology.place_of_global_rank(rank) for rank in topology.peers(place, pipeline_rank)]
                assert [peer.tensor_rank for peer in peers] == list(range(topology.size(peers[0].site).tensor))
                for peer in peers:
                    assert peer.pipeline_rank == pipeline_rank
                    assert peer.context_rank == place.context_rank
                    assert topology.edge_replica(peer) == topology.edge_replica(place)
                    assert place.global_rank in topology.peers(peer, place.pipeline_rank)


def test_both_sites_deal_the_global_batch_alike():
    """Megatron gives microbatch n of the global batch to replica n mod dp; the table puts j into domain j mod D."""
    for topology in TOPOLOGIES:
        for number in range(2 * topology.cloud.data):
            replica, j = number % topology.edge.data, number // topology.edge.data
            domain = j % topology.domains
            cloud = [p.data_rank for p in topology.places() if p.site is Site.CLOUD and p.domain == domain]
            assert number % topology.cloud.data in {c for c in cloud if c % topology.edge.data == replica}, (
                "the cloud replica that Megatron deals it to is not the one the edge sends it to"
            )


@pytest.mark.parametrize("lead", [False, True])
def test_pieces_are_one_copy_and_both_ends_mean_the_same(lead):
    for topology in TOPOLOGIES:
        sent: Counter[tuple[int, int, int, int]] = Counter()
        received: Counter[tuple[int, int, int, int]] = Counter()
        for place in topology.places():
            for pipeline_rank in set(neighbours(topology, place)):
                if not topology.crosses(place, pipeline_rank):
                    continue
                for piece in topology.pieces(place, pipeline_rank, lead):
                    start, stop = piece.bounds(topology.parts * 12)
                    if place.site is Site.EDGE:
                        sent[place.global_rank, piece.global_rank, start, stop] += 1
                    else:
                        received[piece.global_rank, place.global_rank, start, stop] += 1
        assert sent == received and set(sent.values()) == {1}
        covered: Counter[tuple[int, int]] = Counter()
        for edge, cloud, start, stop in sent:
            replica = topology.place_of_global_rank(edge)
            row = topology.place_of_global_rank(cloud).pipeline_rank
            covered[replica.context_rank, replica.data_rank, row] += stop - start
        assert set(covered.values()) == {topology.parts * 12}, "not exactly one copy for each pair of pipeline ranks"


def test_pieces_of_sizes_of_which_none_divides_the_other():
    topology = Topology(2, SiteSize(2), SiteSize(3))
    edges = [[(p.global_rank, *p.bounds(12)) for p in topology.pieces(topology.places()[e], 1)] for e in (0, 1)]
    assert edges == [[(2, 0, 4), (3, 4, 6)], [(3, 6, 8), (4, 8, 12)]]


def test_an_edge_alone():
    topology = Topology(1)
    assert topology.total_processes == 1 and topology.places()[0].pipeline_rank == 0 and topology.domains == 1


@pytest.mark.parametrize(
    ("edge", "cloud", "message"),
    [
        (SiteSize(data=2), SiteSize(data=3), r"cloud's data parallel size 3 is not a multiple of the edge's 2.*2 or 4"),
        (
            SiteSize(data=4),
            SiteSize(data=2),
            r"cloud's data parallel size 2 is not a multiple of the edge's 4.*give the cloud 4",
        ),
        (SiteSize(context=1), SiteSize(context=2), r"context parallel size is 1 and the cloud's 2; they must be equal"),
        (SiteSize(tensor=0), SiteSize(), "at least 1"),
    ],
)
def test_sizes_that_cannot_be_joined_are_refused(edge, cloud, message):
    with pytest.raises(ConfigError, match=message):
        Topology(2, edge, cloud)
