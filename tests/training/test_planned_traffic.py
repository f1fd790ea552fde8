"""Bytes and messages of a step, against counting by hand and against what each process would really post."""

from __future__ import annotations

import math
from itertools import product

import pytest

from ldt_schedules.comm.crossing_plan import Count, Direction, MessageSpec
from ldt_schedules.planning import Layout, plan
from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.dependencies import What
from ldt_schedules.topology import Site, SiteSize, Topology
from ldt_schedules.training.config import TrainConfig, load_config
from ldt_schedules.training.describe import describe_run
from ldt_schedules.training.planned_traffic import (
    CROSSINGS,
    message_spec,
    planned_traffic,
    total,
)
from ldt_schedules.training.schedule import table_source

S, B, H, ITEMSIZE = 12, 2, 5, 2
SIZE = S * B * H * ITEMSIZE
UP, DOWN = Direction.UP, Direction.DOWN
A, G = What.ACTIVATION, What.GRADIENT


def spec(value):
    return MessageSpec((S, B, H), ITEMSIZE)


def pieces_of_one_tensor(tp_edge, tp_cloud, length=S):
    """Cuts of a sequence at the places where either site's processes begin, if they fall on whole positions."""
    if length % math.lcm(tp_edge, tp_cloud):
        return 1
    cuts = {i * length // tp_edge for i in range(tp_edge)} | {i * length // tp_cloud for i in range(tp_cloud)}
    return len(cuts)


@pytest.mark.parametrize(("tp_edge", "tp_cloud"), list(product((1, 2, 3), repeat=2)))
def test_a_u_sends_every_microbatch_up_and_down_and_its_gradient_back(tp_edge, tp_cloud):
    for ranks, microbatches, dp_edge, domains in product((2, 3, 4), range(1, 7), (1, 2), (1, 2)):
        topology = Topology(ranks, SiteSize(tp_edge, data=dp_edge), SiteSize(tp_cloud, data=dp_edge * domains))
        table = plan("ldt_1f1b", Layout.u(ranks, domains), microbatches)
        each = Count(microbatches * dp_edge * pieces_of_one_tensor(tp_edge, tp_cloud), microbatches * dp_edge * SIZE)
        expected = dict.fromkeys(CROSSINGS, each)
        assert planned_traffic(table, topology, spec) == expected, (ranks, microbatches, dp_edge, domains)
        assert total(expected, UP) == Count(2 * each.messages, 2 * each.num_bytes)


def by_process(table, topology, lead):
    """Counted the other way round: each process walks its own row, as the runtime does."""
    found = dict.fromkeys(CROSSINGS, Count())
    for place in topology.places():
        for action in table.ranks[place.pipeline_rank]:
            if action.kind.is_send and topology.crosses(place, action.peer):
                key = (UP if place.site is Site.EDGE else DOWN, A if action.kind is Kind.SEND_F else G)
                for piece in topology.pieces(place, action.peer, lead) * len(action.microbatches):
                    start, stop = piece.bounds(S)
                    found[key] = Count(
                        found[key].messages + 1, found[key].num_bytes + (stop - start) * B * H * ITEMSIZE
                    )
    return found


@pytest.mark.parametrize("lead", [False, True])
@pytest.mark.parametrize("planner", ["ldt_1f1b", "gpipe"])
def test_it_is_what_the_processes_post(planner, lead):
    for tp_edge, tp_cloud, domains, forward_only in product((1, 2), (1, 2, 4), (1, 3), (False, True)):
        topology = Topology(3, SiteSize(tp_edge), SiteSize(tp_cloud, data=domains))
        table = plan(planner, Layout.u(3, domains), 5, forward_only=forward_only)
        assert planned_traffic(table, topology, spec, lead) == by_process(table, topology, lead)


def test_an_evaluation_sends_no_gradient():
    table = plan("ldt_1f1b", Layout.u(3), 4, forward_only=True)
    planned = planned_traffic(table, Topology(3), spec)
    assert planned == {(UP, A): Count(4, 4 * SIZE), (DOWN, A): Count(4, 4 * SIZE), (UP, G): Count(), (DOWN, G): Count()}


def test_a_sequence_that_cannot_be_cut_crosses_whole():
    topology = Topology(3, SiteSize(2), SiteSize(3))
    table = plan("ldt_1f1b", Layout.u(3), 2)
    odd = MessageSpec((7, B, H), ITEMSIZE)
    assert planned_traffic(table, topology, lambda value: odd)[UP, A] == Count(2, 2 * 7 * B * H * ITEMSIZE)


def test_a_tensor_without_an_element_is_not_sent():
    table = plan("ldt_1f1b", Layout.u(3), 3)
    planned = planned_traffic(
        table, Topology(3), lambda value: MessageSpec((0 if value.microbatch == 1 else S, B, H), ITEMSIZE)
    )
    assert all(count == Count(2, 2 * SIZE) for count in planned.values())


def test_frozen_stages_before_the_link_get_no_gradient():
    layout = Layout.laps(3, 2).freeze({0, 1, 2})
    planned = planned_traffic(plan("ldt_2lap_1f1b", layout, 4), Topology(3), spec)
    assert planned[UP, A] == planned[DOWN, A] == Count(8, 8 * SIZE)
    # Stages 3 to 6 learn. Stage 3, the second lap's first, sends none back; 3 to 4 and 5 to 6 are crossed.
    assert planned[DOWN, G] == planned[UP, G] == Count(4, 4 * SIZE)


def test_an_edge_alone_sends_nothing():
    table = plan("ldt_1f1b", Layout.u(2), 2)
    lone = planned_traffic(plan("one_f_one_b", Layout.alone(), 2), Topology(1), spec)
    assert all(count == Count() for count in lone.values()) and planned_traffic(table, Topology(2), spec) != lone


@pytest.mark.parametrize("name", ["quickstart", "asymmetric", "two_sites", "qwen2_5_vl_tiny"])
def test_it_agrees_with_the_first_screen_of_a_run(name):
    overrides = ["schedule.planner=ldt_1f1b"] if name == "two_sites" else []
    config = load_config(f"configs/{name}.yaml", overrides)
    table = table_source(config)(config.num_microbatches, False)
    planned = planned_traffic(table, config.topology, message_spec(config))
    link = describe_run(config, 256).link
    assert total(planned, UP).num_bytes == link.up_bytes_per_step
    assert total(planned, DOWN).num_bytes == link.down_bytes_per_step


def test_what_a_message_is_follows_the_config():
    config = TrainConfig(
        model={"hidden_size": 64, "seq_length": 32, "precision": "bf16"},
        train={"micro_batch_size": 2, "global_batch_size": 4},
    )
    table = table_source(config)(2, False)
    assert planned_traffic(table, config.topology, message_spec(config))[UP, A] == Count(2, 2 * 32 * 2 * 64 * 2)
