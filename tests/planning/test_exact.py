"""Exact plans: optima that can be worked out by hand, and the two things they are there for: judging bounds and planners.

All searches run on one thread; the limits are far above what these sizes take, and running into one is not a failure.
"""

from __future__ import annotations

import math
import random
import sys

import pytest

from ldt_schedules.planning import PLANNERS, Action, Costs, Kind, Layout, ScheduleError, Stage, check, simulate
from ldt_schedules.planning.bounds import lower_bounds
from ldt_schedules.planning.costs import Link
from ldt_schedules.planning.lowering import lower
from ldt_schedules.planning.memory import peak_memory
from ldt_schedules.planning.planners.exact import exact
from ldt_schedules.planning.planners.published import published
from ldt_schedules.planning.problem import MEMORY_SLACK, Problem

pytest.importorskip("ortools")

LIMIT_S = 3.0
QUICK = 3000
"""Effort of `auto`: however long it searches, it may not be below the optimum."""
PAIR = Layout((Stage(0, "first", (0,), ()), Stage(1, "last", (1,), (0,))))
FORK = Layout(
    (Stage(0, "a", (0,), ()), Stage(1, "b", (1,), ()), Stage(2, "join", (1,), (0, 1)), Stage(3, "loss", (0,), (2,)))
)
SHARED = tuple((a, b, Link(0.0, 0.5, "uplink")) for a in (0, 1) for b in (0, 1) if a != b)


def fits(problem, order):
    peaks = peak_memory(simulate(problem.layout, order, problem.costs), problem.costs)
    return all(peak <= problem.cap(rank) + MEMORY_SLACK for rank, peak in enumerate(peaks))


def check_plan(problem, plan):
    """What holds for every result, optimal or not."""
    timeline = simulate(problem.layout, plan.order, problem.costs)
    assert timeline.makespan == plan.makespan
    assert plan.lower_bound <= plan.makespan
    assert fits(problem, plan.order)
    check(lower(problem.layout, problem.num_microbatches, plan.order, timeline=timeline))


@pytest.mark.parametrize(
    ("problem", "split", "optimum"),
    [
        # One microbatch: the way up and back, 3 forwards, 3 backwards, 4 messages.
        (Problem(Layout.u(2), 1), False, 9.0),
        (Problem(Layout.u(2), 1, Costs(latency=2.5)), False, 19.0),
        # I passes the gradient on; only the W of the head is left at the end.
        (Problem(Layout.u(2), 1), True, 7.0),
        # The edge is never idle: head and tail, 3 + 3 for each microbatch.
        (Problem(Layout.u(2), 4), False, 24.0),
        (Problem(Layout.u(2), 4), True, 24.0),
        # Room for one head and one tail on the edge: the next tail waits for the head before it, and from there on it is
        # F 1, B 2, then B 2 on the cloud and B 2 of the head.
        (Problem(Layout.u(2), 3, memory_cap=(2.0, None)), False, 9.0 + 7.0 + 7.0),
        # Room for two activations on the first rank: the last one has no gap (1 + 3 (1 + 1) + 1); for one: 4 each.
        (Problem(PAIR, 3, Costs(backward=1.0), (2.0, None)), False, 8.0),
        (Problem(PAIR, 3, Costs(backward=1.0), (1.0, None)), False, 12.0),
        # F F I I takes 4; a W that holds nothing may wait to the end, else it must make room for the second microbatch.
        (Problem(PAIR, 2, Costs(memory_w=0.0), (1.0, None)), True, 9.0),
        (Problem(PAIR, 2, Costs(), (1.0, None)), True, 10.0),
        # F0 1, two transmissions of 2, F1 1, B1 1, one transmission back, B0 1.
        (Problem(PAIR, 2, Costs(backward=1.0, bandwidth=0.5)), False, 10.0),
        # The same with one wire for both directions: 1, four transmissions of 2, 1; F1 and B1 of the one go on beside the
        # transmission of the other.
        (Problem(PAIR, 2, Costs(backward=1.0, links=SHARED)), False, 10.0),
        # Three messages each way: the wire is never idle between the first F0 and the last B0.
        (Problem(PAIR, 3, Costs(backward=1.0, links=SHARED)), False, 14.0),
        # Microbatches of 1 and 3 on the first rank: 8 of work, and a gap of 1 before the first gradient, or before the long.
        (Problem(PAIR, 2, Costs(forward=((1.0, 3.0), 1.0), backward=((1.0, 3.0), 1.0))), False, 9.0),
    ],
)
def test_optima_worked_out_by_hand(problem, split, optimum):
    plan = exact(problem, split, LIMIT_S)
    check_plan(problem, plan)
    assert plan.is_optimal
    assert plan.makespan == plan.lower_bound == optimum


def random_problem(kind, seed):
    rng = random.Random(f"{kind} {seed}")
    layout = {
        "u": Layout.u(rng.choice((2, 3))),
        "two laps": Layout.laps(2, 2),
        "several roots": FORK,
        "domains": Layout.u(2, domains=2),
        "wires": Layout.u(rng.choice((2, 3))),
    }[kind]
    microbatches = rng.choice((2, 3, 4) if kind in ("u", "domains") else (2, 3))
    uniform = rng.random() < 0.7

    def times():
        one = [rng.choice((0.5, 1.0, 1.5, 2.0, 3.0)) for _ in range(microbatches)]
        return one[0] if uniform else tuple(one)

    stages = layout.stages
    memory = tuple(rng.choice((0.5, 1.0, 1.0, 2.0)) for _ in stages)
    names = ("forward", "backward", "input_grad", "weight_grad")
    costs = {name: tuple(times() for _ in stages) for name in names}
    costs |= {"memory": memory, "memory_w": tuple(m * rng.choice((0.0, 0.5, 1.0)) for m in memory)}
    costs |= {"latency": rng.choice((0.0, 0.5, 2.0)), "bandwidth": rng.choice((0.5, 1.0)) if kind == "wires" else None}
    problem = Problem(layout, microbatches, Costs(**costs))
    caps = peak_memory(simulate(layout, published(problem), problem.costs), problem.costs)
    share = rng.choice((0.7, 1.0, 1.0, None))
    if share is not None:
        total = [sum(memory[s] for s in layout.stages_on(rank)) for rank in range(layout.num_ranks)]
        problem = problem.with_caps(tuple(max(cap * share, least) for cap, least in zip(caps, total, strict=True)))
    return problem


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["u", "two laps", "several roots", "domains", "wires"])
def test_bounds_and_planners_against_the_optimum(kind, seed):
    problem = random_problem(kind, seed)
    plans = {split: exact(problem, split, LIMIT_S) for split in (False, True)}
    for split, plan in plans.items():
        check_plan(problem, plan)
        bound = lower_bounds(problem, split).best
        assert bound <= plan.makespan + 1e-6
        if plan.is_optimal:
            assert plan.lower_bound >= bound - 1e-6
    for name, planner in PLANNERS.items():
        if name == "exact":
            continue  # it is what the others are compared with
        try:
            order = planner(problem, QUICK) if name.startswith("auto") else planner(problem)
        except ScheduleError:
            continue  # not for this layout
        is_split = any(action.kind is Kind.I for row in order for action in row)
        if fits(problem, order):
            makespan = simulate(problem.layout, order, problem.costs).makespan
            assert makespan >= plans[is_split].lower_bound * (1 - 1e-6), name


def test_times_that_are_no_multiples():
    """Rounded down, so that the bound stays below; close enough to be called optimal."""
    costs = Costs(forward=(math.pi, math.e, math.sqrt(2)), backward=(1 / 7, math.pi**2, 0.1), latency=math.log(2))
    problem = Problem(Layout.u(2), 1, costs)
    plan = exact(problem, False, LIMIT_S)
    way = math.pi + math.e + math.sqrt(2) + 1 / 7 + math.pi**2 + 0.1 + 4 * math.log(2)
    assert plan.makespan == pytest.approx(way)
    assert way * (1 - 1e-7) < plan.lower_bound < way
    assert plan.is_optimal


def test_thirds_and_tenths_are_exact():
    problem = Problem(Layout.u(2), 2, Costs(forward=0.1, backward=1 / 3, latency=0.37219))
    plan = exact(problem, False, LIMIT_S)
    assert plan.lower_bound == pytest.approx(plan.makespan, rel=1e-12)


def test_memory_that_fits_only_when_rounded():
    """Two heads and a tail are 3.000002: rounded to 2**-20 of the cap of 3 they would fit."""
    problem = Problem(Layout.u(2), 2, Costs(memory=(1.000001, 1.0, 1.0)), (3.0, None))
    plan = exact(problem, False, LIMIT_S)
    check_plan(problem, plan)
    assert plan.makespan == 9.0 + 7.0  # as with room for one head and one tail
    assert plan.lower_bound < plan.makespan and not plan.is_optimal


def test_a_hint_is_never_lost():
    """Not even where the time is too short to find anything; nor when it numbers equal microbatches differently."""
    problem = Problem(Layout.u(2), 3)
    hint = PLANNERS["gpipe"](problem)
    renamed = tuple(tuple(Action(a.kind, a.stage, (2 - a.microbatches[0],)) for a in row) for row in hint)
    makespan = simulate(problem.layout, hint, problem.costs).makespan
    for order in (hint, renamed):
        assert exact(problem, False, 1e-9, order).makespan <= makespan
        assert exact(problem, False, LIMIT_S, order).makespan == 18.0


def test_a_hint_that_does_not_fit_into_the_memory_is_only_a_hint():
    problem = Problem(Layout.u(2), 3, memory_cap=(2.0, None))
    plan = exact(problem, False, LIMIT_S, PLANNERS["gpipe"](problem))
    check_plan(problem, plan)
    assert plan.makespan == 23.0


def test_a_hint_for_another_problem():
    problem = Problem(Layout.u(2), 3)
    hint = PLANNERS["gpipe"](Problem(Layout.u(2), 4))
    with pytest.raises(
        ScheduleError, match="the hint has 24 actions, the problem 18; they differ in B s0 m3 on rank 0"
    ):
        exact(problem, False, LIMIT_S, hint)


def test_too_little_time():
    with pytest.raises(ScheduleError, match="no order was found within 1e-09 s for 48 actions"):
        exact(Problem(Layout.u(3), 6), False, 1e-9)
    with pytest.raises(ScheduleError, match="must be more than 0 s, got 0"):
        exact(Problem(Layout.u(3), 6), False, 0)


def test_no_order_fits():
    """Both roots stand on rank 0, and the join can only run when both activations are held there."""
    roots = Layout((Stage(0, "a", (0,), ()), Stage(1, "b", (0,), ()), Stage(2, "join", (1,), (0, 1))))
    with pytest.raises(ScheduleError, match="rank 0"):
        exact(Problem(roots, 2, memory_cap=(1.0, None)), False, LIMIT_S)


def test_without_or_tools(monkeypatch):
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    with pytest.raises(ScheduleError, match=r"pip install 'ldt-schedules\[exact\]'"):
        exact(Problem(Layout.u(2), 1), False, LIMIT_S)
