"""Bounds worked out by hand, and that no order is ever below one."""

from __future__ import annotations

import random
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldt_schedules.planning import PLANNERS, Costs, Kind, Layout, ScheduleError, Stage, simulate
from ldt_schedules.planning.bounds import lower_bounds, one_machine
from ldt_schedules.planning.costs import Link
from ldt_schedules.planning.memory import peak_memory
from ldt_schedules.planning.planners.auto import auto, auto_zb
from ldt_schedules.planning.problem import Problem
from tests.planning.random_problems import random_costs, random_layout, random_order, with_domain_of

PAIR = Layout((Stage(0, "first", (0,), ()), Stage(1, "last", (1,), (0,))))
SHARED = tuple((a, b, Link(0.0, 0.5, "uplink")) for a in (0, 1) for b in (0, 1) if a != b)
QUICK = 1500
"""Effort of `auto` where any order will do."""


@pytest.mark.parametrize(
    ("problem", "split", "path"),
    [
        # Up and back: 3 forwards of 1, 3 backwards of 2, 4 messages.
        (Problem(Layout.u(2), 1, Costs(latency=2.5)), False, 9 + 10),
        # Only the last backward needs its W at the end.
        (Problem(Layout.u(2), 1, Costs(latency=2.5)), True, 7 + 10),
        # I and W are 3 together, B is 2: a stage may do B, and then only that much is certain.
        (Problem(PAIR, 1, Costs(input_grad=1.0, weight_grad=2.0)), True, 1 + 1 + 1 + 1 + 1),
        # A message of 1 at bandwidth 0.5 takes 2, twice.
        (Problem(PAIR, 1, Costs(bandwidth=0.5)), False, 6 + 4),
        # The last of 3 starts on the first rank at 2, and on the second B has 2 before it: 1 + 1 + 3 * 2, then B.
        (Problem(PAIR, 3), False, 2 + 3 * 2 + 2),
        # Room for one: each waits for the one before it.
        (Problem(PAIR, 3, memory_cap=(1.0, None)), False, 3 * 6),
        # Microbatches of different length: the longest alone.
        (Problem(PAIR, 2, Costs(forward=((1.0, 3.0), 1.0), backward=((1.0, 3.0), 1.0))), False, 3 + 1 + 1 + 3),
    ],
)
def test_the_path_by_hand(problem, split, path):
    assert lower_bounds(problem, split).path == path


@pytest.mark.parametrize(
    ("problem", "split", "per_rank"),
    [
        # Rank 1 begins at 1, has 3 F and 3 B, and B of rank 0 follows. Rank 0: its last B begins at 8 at the earliest.
        (Problem(PAIR, 3), False, (10, 1 + 9 + 2)),
        # W is nobody's input: after the last I there are W and, beside it, I and W of rank 0.
        (Problem(PAIR, 3), True, (9, 1 + 9 + 0)),
        # The edge has head and tail and is never idle.
        (Problem(Layout.u(2), 4), False, (24, 1 + 12 + 2)),
        # The cloud begins after F of the edge and a latency; after its last B a latency and B of the edge.
        (Problem(PAIR, 5, Costs(forward=(1.0, 4.0), backward=(1.0, 4.0), latency=3)), False, (None, 4 + 40 + 4)),
        # Nothing to do on rank 2.
        (Problem(Layout(PAIR.stages, 3), 2), False, (None, 1 + 6 + 2, 0)),
    ],
)
def test_ranks_by_hand(problem, split, per_rank):
    bounds = lower_bounds(problem, split)
    assert all(one is None or one == other for one, other in zip(per_rank, bounds.per_rank, strict=True))
    assert bounds.rank == max(bounds.per_rank)


def test_a_rank_with_work_of_two_domains_has_both_on_its_machine():
    """The edge serves two clouds, 2 microbatches each: 4 times F F B B."""
    bounds = lower_bounds(Problem(Layout.u(2, domains=2), 4), False)
    assert bounds.per_rank[0] == 24 and bounds.per_rank[1] == bounds.per_rank[2]


def test_a_shared_wire_is_one_machine():
    """Three activations and three gradients of 2 each between the first F and the last B, of 1."""
    bounds = lower_bounds(Problem(PAIR, 3, Costs(backward=1.0, links=SHARED)), False)
    assert (bounds.link, bounds.reason, bounds.best) == (14.0, "link", 14.0)
    single = tuple((a, b, Link(0.0, 0.5)) for a, b, _ in SHARED)
    assert lower_bounds(Problem(PAIR, 3, Costs(backward=1.0, links=single)), False).link == 1 + 6 + (1 + 1 + 2 + 1)
    assert lower_bounds(Problem(PAIR, 3, Costs(latency=3)), False).link == 0


@pytest.mark.parametrize(
    ("problem", "split", "memory"),
    [
        # Held for F F B B = 4, three times, one after the other or two beside each other.
        (Problem(PAIR, 3, Costs(backward=1.0), (1.0, None)), False, 12),
        (Problem(PAIR, 3, Costs(backward=1.0), (2.0, None)), False, 6),
        # Head 9, tail 3, in a room of 2.
        (Problem(Layout.u(2), 3, memory_cap=(2.0, None)), False, 3 * 12 / 2),
        # On the second rank: it begins at 1 and B of the first follows.
        (Problem(PAIR, 3, memory_cap=(None, 1.0)), False, 1 + 3 * 3 + 2),
        # F F I I, and what W needs is no memory, or all of it.
        (Problem(PAIR, 2, Costs(memory_w=0.0), (1.0, None)), True, 8),
        (Problem(PAIR, 2, Costs(), (1.0, None)), True, 10),
        (Problem(PAIR, 2, Costs(memory=2.0, memory_w=0.5), (2.0, None)), True, 2 * (1.5 * 4 + 0.5 * 5) / 2),
        # The latency counts: 6 + 2 * 5.
        (Problem(PAIR, 4, Costs(latency=5, memory=3.0), (6.0, None)), False, 4 * 3 * 16 / 6),
        (Problem(PAIR, 4), False, 0),
    ],
)
def test_memory_by_hand(problem, split, memory):
    assert lower_bounds(problem, split).memory == pytest.approx(memory)


def test_the_best_bound_is_the_largest_and_has_its_reason():
    bounds = lower_bounds(Problem(Layout.u(2), 8), False)
    assert bounds.best == max(bounds.path, bounds.rank, bounds.link, bounds.memory) == 48
    assert bounds.reason == "rank"


JOBS = st.lists(st.tuples(*[st.integers(0, 12).map(float)] * 3), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(JOBS)
def test_one_machine_is_the_best_with_interruptions(jobs):
    """Carlier 1982: the preemptive optimum is the largest min(head) + work + min(tail) of any set of jobs. No
    order without interruptions is below it."""
    bound = one_machine(jobs)
    sets = [s for size in range(1, len(jobs) + 1) for s in combinations([j for j in jobs if j[1] > 0], size)]
    whole = [min(h for h, _, _ in s) + sum(d for _, d, _ in s) + min(t for _, _, t in s) for s in sets]
    alone = [h + d + t for h, d, t in jobs]
    assert bound == max([*whole, *alone])
    best = float("inf")
    for order in permutations(jobs):
        now = last = 0.0
        for head, duration, tail in order:
            now = max(now, head) + duration
            last = max(last, now + tail)
        best = min(best, last)
    assert bound <= best


def capped(rng, problem, order):
    """The problem with, on some ranks, just the memory that the order needs."""
    peaks = peak_memory(simulate(problem.layout, order, problem.costs), problem.costs)
    caps = tuple(peak if rng.random() < 0.6 else None for peak in peaks)
    try:
        return problem.with_caps(caps)
    except ScheduleError as error:
        raise AssertionError(f"{peaks} were enough: {error}") from error


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 10**9))
def test_no_order_is_below_a_bound(seed):
    """Any order: random ones, in which each backward is whole or split as it comes, and those of planners."""
    rng = random.Random(seed)
    microbatches = rng.randint(1, 6)
    layout = with_domain_of(rng, random_layout(rng), microbatches)
    if rng.random() < 0.4:
        layout = rng.choice((Layout.u, Layout.laps))(rng.randint(2, 4))
    costs = random_costs(rng, layout, microbatches, wires=rng.random() < 0.4, uniform=rng.random() < 0.6)
    problem = Problem(layout, microbatches, costs)
    orders = [random_order(rng, layout, microbatches)]
    orders += [auto(problem, QUICK), auto_zb(problem, QUICK)]
    for name in (name for name in PLANNERS if name not in ("auto", "auto_zb", "exact")):
        try:
            orders.append(PLANNERS[name](problem))
        except ScheduleError:
            continue  # not for this layout
    for order in orders:
        split = any(action.kind is Kind.I for row in order for action in row)
        held = capped(rng, problem, order)
        makespan = simulate(layout, order, costs).makespan
        for one in (problem, held):
            assert lower_bounds(one, split).best <= makespan * (1 + 1e-9)
            assert lower_bounds(one, True).best <= makespan * (1 + 1e-9)


@pytest.mark.parametrize("split", [False, True])
def test_less_memory_never_lowers_the_bound(split):
    bounds = [lower_bounds(Problem(Layout.u(3), 8, Costs(latency=4), (cap,) * 3), split).best for cap in range(2, 12)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[-1]


@pytest.mark.parametrize("memory", [1 / 3, 1 / 30, 0.1 + 0.2])
def test_bounds_grant_what_caps_forgive(memory):
    """Peaks are rounded to 9 digits: a cap of 0.033333333 is room for one activation of 1 / 30."""
    problem = Problem(PAIR, 3, Costs(backward=1.0, memory=memory))
    order = PLANNERS["one_f_one_b"](problem)
    timeline = simulate(PAIR, order, problem.costs)
    caps = tuple(peak - 5e-10 for peak in peak_memory(timeline, problem.costs))
    assert lower_bounds(problem.with_caps(caps), False).best <= timeline.makespan
