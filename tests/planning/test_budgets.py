"""Budgets of memory in words, what memory is worth, and how deep a pipeline must be."""

from __future__ import annotations

import math

import pytest

from ldt_schedules.planning import PLANNERS, Costs, Layout, ScheduleError, Stage, simulate
from ldt_schedules.planning.budgets import COMPARED, DEFAULT_BUDGET, published_peaks, within_budget
from ldt_schedules.planning.evaluation import depths, evaluate, plan_and_evaluate, worth_of_memory
from ldt_schedules.planning.memory import peak_memory
from ldt_schedules.planning.problem import Problem

U4 = Problem(Layout.u(4), 8)
"""The published order keeps 5 heads and a tail on the edge, and 4, 3, 2 microbatches on the cloud's ranks."""


def caps(problem, budget):
    allowed = within_budget(problem, budget)
    return [allowed.cap(rank) for rank in range(problem.layout.num_ranks)]


def test_what_the_published_order_holds():
    assert published_peaks(U4) == (6, 4, 3, 2)
    assert published_peaks(U4) == peak_memory(simulate(U4.layout, PLANNERS["ldt_1f1b"](U4)), U4.costs)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("none", [math.inf] * 4),
        ("1x", [6, 4, 3, 2]),
        ("2x", [12, 8, 6, 4]),
        ("1.5x", [9, 6, 4.5, 3]),
        (" 4x ", [24, 16, 12, 8]),
        ("dev", [24, 4, 4, 4]),
        ("7", [7] * 4),
        ("2.5e3", [2500] * 4),
        ("8GiB", [8 * 2**30] * 4),
        ("8 GiB", [8 * 2**30] * 4),
        ("512MiB", [2**29] * 4),
        ("3B", [3] * 4),
        ("1GiB,40,1KiB, 2TiB", [2**30, 40, 2**10, 2**41]),
    ],
)
def test_budgets(budget, expected):
    assert caps(U4, budget) == expected


def test_the_default_is_one_of_those_that_are_compared():
    assert DEFAULT_BUDGET in COMPARED and DEFAULT_BUDGET == "dev"


def test_of_the_own_caps_and_the_budget_the_smaller_counts():
    own = Problem(Layout.u(4), 8, memory_cap=(4, None, 10, 1))
    assert caps(own, "none") == [4, math.inf, 10, 1]
    assert caps(own, "1x") == [4, 4, 3, 1]
    assert caps(own, "5") == [4, 5, 5, 1]


def test_other_layouts_are_measured_against_their_published_orders():
    laps = Problem(Layout.laps(2), 6)
    assert published_peaks(laps) == peak_memory(simulate(laps.layout, PLANNERS["ldt_2lap_1f1b"](laps)), laps.costs)
    alone = Problem(Layout((Stage(0, "all", (0,), ()),)), 3)
    assert caps(alone, "dev") == [4]
    assert caps(alone, "1x") == [1]


def test_a_budget_for_a_domain_without_microbatches():
    """One microbatch and two clouds: the second cloud holds nothing, and that is enough."""
    assert caps(Problem(Layout.u(2, domains=2), 1), "1x") == [2, 1, 0]


@pytest.mark.parametrize(
    "budget", ["", "x", "lots", "8 GB", "8gib", "-1", "-1x", "1,2", "1,2,3,4,5", "8GiB,", "inf", "nanx"]
)
def test_a_budget_that_cannot_be_read(budget):
    with pytest.raises(ScheduleError, match="budget") as caught:
        within_budget(U4, budget)
    assert repr(budget) in str(caught.value)


@pytest.mark.parametrize(("budget", "rank", "needed"), [("1", 0, 2), ("0x", 0, 2), ("9,9,0.5,9", 2, 1)])
def test_a_budget_that_is_too_small_names_the_rank_and_what_it_needs(budget, rank, needed):
    with pytest.raises(ScheduleError, match=f"give rank {rank} at least {needed}"):
        within_budget(U4, budget)


@pytest.mark.parametrize("name", ["auto", "ldt_1f1b"])
@pytest.mark.parametrize("latency", [0, 4])
def test_more_memory_is_never_worth_less(name, latency):
    problem = Problem(Layout.u(3), 8, Costs(latency=latency))
    worth = worth_of_memory(name, problem)
    assert [one.budget for one in worth] == list(COMPARED)
    spans = {one.budget: one.makespan for one in worth}
    for chain in (("1x", "1.5x", "2x", "4x", "none"), ("1x", "dev", "none")):
        assert [spans[b] for b in chain] == sorted((spans[b] for b in chain), reverse=True)
    bounds = {one.budget: one.bound for one in worth}
    assert bounds["1x"] >= bounds["2x"] >= bounds["none"]
    assert all(one.bound <= one.makespan + 1e-9 for one in worth)
    if name == "auto":
        for one in worth:
            allowed = within_budget(problem, one.budget)
            assert all(peak <= allowed.cap(rank) + 1e-6 for rank, peak in enumerate(one.peaks))
        assert latency == 0 or spans["2x"] < spans["1x"]


def test_an_evaluation_says_whether_the_caps_are_kept():
    tight = Problem(Layout.u(4), 8, memory_cap=(4, None, None, None))
    assert not plan_and_evaluate("ldt_1f1b", tight).fits
    assert plan_and_evaluate("auto", tight).fits
    assert plan_and_evaluate("ldt_1f1b", U4).fits


def test_rates_are_what_crosses_the_edge_per_time():
    """2 microbatches, each an activation of 3 and a gradient of 5 out of the edge, and as much into it."""
    problem = Problem(Layout.u(2), 2, Costs(forward_size=3.0, backward_size=5.0))
    found = evaluate("gpipe", problem, PLANNERS["gpipe"](problem))
    assert found.makespan == 12
    assert found.rate_up == pytest.approx(2 * (3 + 5) / 12)
    assert found.rate_down == pytest.approx(2 * (3 + 5) / 12)


def test_depths_of_a_u_by_hand():
    """P = 4, latency 4, f = 1, b = 2. The edge has 6 of work for each microbatch. Head: up and back through 5 stages
    (15) and 4 crossings (16). Rank r: itself and all below, and two crossings; the tail turns round at once."""
    problem = Problem(Layout.u(4), 12, Costs(latency=4))
    found = depths(problem, evaluate("ldt_1f1b", problem, PLANNERS["ldt_1f1b"](problem)))
    assert [depth.stage for depth in found] == [0, 1, 2, 3, 4]
    assert [depth.rank for depth in found] == [0, 1, 2, 3, 0]
    assert [depth.round_trip for depth in found] == [15 + 16, 12 + 8, 9 + 8, 6 + 8, 3]
    assert [depth.needed for depth in found] == [6, 4, 3, 3, 1]
    assert [depth.used for depth in found] == [5, 4, 3, 2, 1]
