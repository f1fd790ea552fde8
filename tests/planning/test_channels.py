"""Lanes of the ring: on no rank does one lane both send and receive."""

from __future__ import annotations

import pytest

from ldt_schedules.planning.channels import Lane, lane


@pytest.mark.parametrize("ranks", range(2, 12))
def test_no_lane_sends_and_receives_at_one_rank(ranks):
    links = {(r, (r + step) % ranks) for r in range(ranks) for step in (1, -1)}
    for rank in range(ranks):
        sending = {lane(*link) for link in links if link[0] == rank}
        receiving = {lane(*link) for link in links if link[1] == rank}
        assert not sending & receiving, (rank, sending, receiving)


def test_even_ranks_send_on_pang():
    assert lane(0, 1) is lane(2, 1) is Lane.PANG
    assert lane(1, 0) is lane(1, 2) is Lane.PING


def test_two_ranks_have_two_lanes():
    """D26: with P = 2 the published code puts both directions into one group."""
    assert lane(0, 1) is not lane(1, 0)


def test_an_odd_ring_has_a_lane_for_each_direction_of_its_wrap():
    assert (lane(2, 0), lane(0, 2)) == (Lane.WRAP_F, Lane.WRAP_B)
    assert lane(3, 0) is Lane.PING
