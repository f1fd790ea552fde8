"""`auto` and `auto_zb`: always valid, within the memory, never below a bound, and close to what can be had.

`LDT_MANY=1` in the environment runs the random problems 10,000 times.
"""

from __future__ import annotations

import math
import os
import random
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldt_schedules.planning import PLANNERS, Costs, Kind, Layout, ScheduleError, Stage, simulate, validate
from ldt_schedules.planning.bounds import lower_bounds
from ldt_schedules.planning.budgets import published_peaks, within_budget
from ldt_schedules.planning.lowering import lower
from ldt_schedules.planning.memory import fits, peak_memory
from ldt_schedules.planning.planners import table_of
from ldt_schedules.planning.planners.auto import auto, auto_zb
from ldt_schedules.planning.planners.exact import exact
from ldt_schedules.planning.planners.improvement import Search
from ldt_schedules.planning.planners.published import published
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.progress import Semantics
from tests.planning.random_problems import random_costs, random_layout, same, with_domain_of

MANY = os.environ.get("LDT_MANY") == "1"
pytestmark = [pytest.mark.timeout(3600)] if MANY else []
EXAMPLES = 10_000 if MANY else 100
QUICK = 2000
SEARCHING = {"auto": auto, "auto_zb": auto_zb}
SWEPT = [name for name in PLANNERS if name != "exact"]
ROOTS = Layout(
    (
        Stage(0, "text", (0,), ()),
        Stage(1, "vision", (1,), ()),
        Stage(2, "audio", (2,), ()),
        Stage(3, "fuse", (1,), (0, 1, 2)),
        Stage(4, "body", (2,), (3,)),
        Stage(5, "tail", (0,), (4, 0)),
    )
)


def layout_of(rng):
    kind = rng.choice(("u", "u", "domains", "laps", "roots", "graph", "graph"))
    if kind == "u":
        return Layout.u(rng.randint(2, 5))
    if kind == "domains":
        return Layout.u(rng.randint(2, 3), rng.randint(2, 3))
    if kind == "laps":
        return Layout.laps(rng.randint(2, 3), 2, rng.randint(1, 2))
    return ROOTS if kind == "roots" else random_layout(rng)


def least_and_enough(problem, rank):
    """What a microbatch holds when its last forward of `rank`, or of a stage that needs it, runs; and what it holds in
    all stages of the rank together, which one microbatch after the other is sure to get along with."""
    layout, costs = problem.layout, problem.costs

    def behind(stage):
        return {stage}.union(*map(behind, layout.stages[stage].inputs))

    least = enough = 0.0
    for m in range(problem.num_microbatches):
        here = {s for s in range(len(layout.stages)) if layout.rank_of(s, m) == rank}
        least = max([least, *(sum(costs.held(s) for s in behind(t) & here) for t in range(len(layout.stages)))])
        enough = max(enough, sum(costs.held(s) for s in here))
    return least, enough


def random_problem(seed):
    """A problem, and whether its memory is surely enough."""
    rng = random.Random(seed)
    microbatches = rng.randint(1, 10)
    layout = with_domain_of(rng, layout_of(rng), microbatches)
    wires, uniform = rng.random() < 0.3, rng.random() < 0.7
    costs = random_costs(rng, layout, microbatches, wires, uniform)
    if rng.random() < 0.4:  # whole numbers: many ties
        costs = replace(
            costs,
            forward=1.0,
            backward=2.0,
            input_grad=1.0,
            weight_grad=1.0,
            memory=float(rng.randint(1, 3)),
            memory_w=None,
        )
    problem, caps, sure = Problem(layout, microbatches, costs), [], True
    for rank, peak in enumerate(published_peaks(problem)):
        least, enough = least_and_enough(problem, rank)
        cap = rng.choice((None, least, enough, peak, rng.uniform(1, 3) * enough))
        cap = cap if cap is None else max(cap, least)
        caps.append(cap)
        sure = sure and (cap is None or cap >= enough)
    return problem.with_caps(tuple(caps)), sure, wires


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 10**9))
def test_every_planner_on_random_problems(seed):
    problem, sure, wires = random_problem(seed)
    for name in SWEPT:
        searching = SEARCHING.get(name)
        try:
            order = searching(problem, QUICK) if searching else PLANNERS[name](problem)
        except ScheduleError as error:
            if searching:
                assert not sure, f"{name}: {error}"
            continue  # not for this layout
        timeline = simulate(problem.layout, order, problem.costs)
        table = table_of(order, problem, timeline=timeline)
        assert validate(table, problem=problem if searching else None) == [], name
        assert table.compute_order() == order
        if not wires:
            assert same(simulate(problem.layout, table.ranks, problem.costs).makespan, timeline.makespan)
        if searching:
            assert fits(peak_memory(timeline, problem.costs), problem), name
            assert lower_bounds(problem, name == "auto_zb").best <= timeline.makespan * (1 + 1e-9)
        else:
            free = problem.with_caps(())
            assert lower_bounds(free, False).best <= timeline.makespan * (1 + 1e-9)


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 4))
def test_tables_of_random_problems_with_and_without_prefetch_and_backwards(seed, prefetch):
    problem, sure, _ = random_problem(seed)
    for name in ("auto", "auto_zb", "gpipe", "one_f_one_b"):
        try:
            order = SEARCHING[name](problem, QUICK) if name in SEARCHING else PLANNERS[name](problem)
        except ScheduleError:
            assert not sure and name in SEARCHING
            continue
        timeline = simulate(problem.layout, order, problem.costs)
        early, late = (
            lower(problem.layout, problem.num_microbatches, order, False, ahead, timeline) for ahead in (prefetch, 0)
        )
        assert validate(early) == []
        assert validate(late, Semantics.BLOCKING) == []
        evaluation = table_of(order, problem, forward_only=True)
        assert validate(evaluation) == []
        assert evaluation.compute_order() == tuple(tuple(a for a in row if a.kind is Kind.F) for row in order)


@pytest.mark.parametrize("latency", [0, 2, 8])
@pytest.mark.parametrize("ranks", range(2, 7))
@pytest.mark.parametrize("name", SEARCHING)
def test_never_slower_than_the_published_order_with_its_memory(name, ranks, latency):
    for microbatches in range(1, 11):
        problem = Problem(Layout.u(ranks), microbatches, Costs(latency=latency))
        order = published(problem)
        problem = within_budget(problem, "1x")
        found = SEARCHING[name](problem, QUICK)
        timeline = simulate(problem.layout, found, problem.costs)
        assert timeline.makespan <= simulate(problem.layout, order, problem.costs).makespan, microbatches
        peaks = peak_memory(timeline, problem.costs)
        assert all(peak <= problem.cap(rank) for rank, peak in enumerate(peaks)), microbatches


@pytest.mark.parametrize(
    ("layout", "microbatches", "latency", "budget"),
    [
        (Layout.u(2), 6, 0, "1x"),
        (Layout.u(2), 6, 2, "1x"),
        (Layout.u(2), 5, 4, "2x"),
        (Layout.u(3), 5, 2, "1x"),
        (Layout.u(3), 5, 2, "none"),
        (Layout.u(4), 4, 1, "1.5x"),
        (Layout.laps(2), 4, 0, "1x"),
        (Layout.laps(2), 3, 2, "none"),
        (Layout.u(2, domains=2), 6, 2, "1x"),
    ],
)
@pytest.mark.parametrize("name", SEARCHING)
def test_close_to_the_proven_optimum(name, layout, microbatches, latency, budget):
    pytest.importorskip("ortools")
    problem = within_budget(Problem(layout, microbatches, Costs(latency=latency)), budget)
    order = SEARCHING[name](problem, 30_000)
    best = exact(problem, name == "auto_zb", 5.0, order)
    makespan = simulate(layout, order, problem.costs).makespan
    assert best.makespan <= makespan
    # Where the search did not close, the best that it found is no proof, but still the thing to compare with.
    assert makespan <= best.makespan * 1.03


def test_equal_input_gives_equal_output():
    for seed in range(20):
        problem, sure, _ = random_problem(seed)
        for planner in SEARCHING.values() if sure else ():
            assert planner(problem, QUICK) == planner(random_problem(seed)[0], QUICK)


GRID = [(p, m, latency, ratio) for p in (2, 4, 8) for m in (8, 32) for latency in (0, 16) for ratio in (0.5, 2.0)]


def test_close_to_the_bound_on_the_grid_of_us():
    """At unlimited memory and at twice that of the published order. (Part of the rest is the bound's: P = 2, M = 8.)"""
    distances = {}
    for cell in ((*us, budget) for us in GRID for budget in ("none", "2x")):
        ranks, microbatches, latency, ratio, budget = cell
        forward = (1.0, *([ratio] * (ranks - 1)), 1.0)
        costs = Costs(forward=forward, backward=tuple(2 * f for f in forward), latency=latency)
        problem = within_budget(Problem(Layout.u(ranks), microbatches, costs), budget)
        makespan = simulate(problem.layout, auto(problem), costs).makespan
        distances[cell] = makespan / lower_bounds(problem, False).best
    mean = math.exp(sum(map(math.log, distances.values())) / len(distances))
    assert mean <= 1.002, distances
    assert max(distances.values()) <= 1.05, distances
    assert min(distances.values()) >= 1 - 1e-9, distances


@pytest.mark.parametrize("only", ["split", "fused"])
@pytest.mark.parametrize("effort", [3000, 20_000])
def test_a_long_step_in_which_one_stage_has_no_choice_how_it_goes_backward(only, effort):
    """The plan of a few microbatches whose middle is repeated has the same kinds of work."""
    mine = {"split": {"backward": None}, "fused": {"input_grad": None, "weight_grad": None}}[only]
    times = {
        "forward": (1.0, 1.3, 1.7, 1.0),
        "backward": (2.0,) * 4,
        "input_grad": (1.0,) * 4,
        "weight_grad": (1.2,) * 4,
    }
    times |= {name: (times[name][0], value, *times[name][2:]) for name, value in mine.items()}
    problem = Problem(Layout.u(3), 100, Costs(latency=4, **times), (8.0, 5.0, 4.0))
    for name, planner in SEARCHING.items():
        order = planner(problem, effort)
        timeline = simulate(problem.layout, order, problem.costs)
        assert fits(peak_memory(timeline, problem.costs), problem)
        assert lower_bounds(problem, name == "auto_zb").best <= timeline.makespan * (1 + 1e-9)
        split = {action.stage for row in order for action in row if action.kind is Kind.I}
        assert (1 in split) is (only == "split") and (0 in split) is (name == "auto_zb")


class CountedSearch(Search):
    """Remembers every search that was made."""

    made: list[Search] = []  # noqa: RUF012 - cleared by the test that uses it

    def __post_init__(self):
        super().__post_init__()
        self.made.append(self)


@pytest.mark.parametrize("name", SEARCHING)
def test_the_cost_of_a_plan_is_a_fixed_number_of_instances_or_of_passes(name, monkeypatch):
    """A step of tight memory, where no bound is met at once: the effort while it lasts, then a few passes."""
    monkeypatch.setattr(sys.modules[auto.__module__], "Search", CountedSearch)
    effort, passes = 20_000, {}
    for microbatches in (4, 64, 512, 2048):
        CountedSearch.made.clear()
        problem = within_budget(Problem(Layout.u(3), microbatches, Costs(latency=7, forward=1.1)), "1x")
        SEARCHING[name](problem, effort)
        size = len(problem.layout.stages) * microbatches * (3 if name == "auto_zb" else 2)
        scheduled = sum(search.effort for search in CountedSearch.made)
        passes[microbatches] = scheduled / size
        assert 0 < scheduled <= 2 * effort + 20 * size, passes
    assert passes[2048] <= passes[512] + 0.5 <= 20, passes


def test_a_bound_that_is_met_at_once_costs_nothing(monkeypatch):
    monkeypatch.setattr(sys.modules[auto.__module__], "Search", CountedSearch)
    CountedSearch.made.clear()
    problem = Problem(Layout.u(4), 64, Costs(forward=(2.0, 1.0, 1.0, 1.0, 2.0), backward=(4.0, 2.0, 2.0, 2.0, 4.0)))
    auto(problem)
    assert sum(search.effort for search in CountedSearch.made) <= 2 * len(problem.layout.stages) * 64 * 2


def test_memory_that_stages_of_one_rank_need_only_in_turn():
    """Both ends of a fork stand on rank 1, and it has room for one: the second must wait for the first's backward."""
    fork = Layout((Stage(0, "root", (0,), ()), Stage(1, "a", (1,), (0,)), Stage(2, "b", (1,), (0,))))
    problem = Problem(fork, 3, memory_cap=(None, 1.0))
    for planner in SEARCHING.values():
        timeline = simulate(fork, planner(problem, QUICK))
        assert peak_memory(timeline, problem.costs)[1] == 1


def test_memory_that_no_order_gets_along_with_is_refused():
    """Each join needs two of the three, in a circle: two fit, but all three will be held at some time."""
    parts = [Stage(s, f"part{s}", (0,), ()) for s in range(3)]
    joins = [Stage(3 + s, f"join{s}", (1,), (s, (s + 1) % 3)) for s in range(3)]
    problem = Problem(Layout((*parts, *joins)), 1, memory_cap=(2.0, None))
    for planner in SEARCHING.values():
        with pytest.raises(ScheduleError, match="rank 0"):
            planner(problem, QUICK)
