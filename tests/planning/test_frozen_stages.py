"""Frozen stages: no gradient is computed, kept or sent that nobody needs, whoever plans; and the rest is as it was."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from ldt_schedules.planning import (
    PLANNERS,
    Action,
    Costs,
    Kind,
    Layout,
    Problem,
    ScheduleError,
    ScheduleTable,
    check,
    plan,
    plan_problem,
    read_table,
    simulate,
    validate,
    write_table,
)
from ldt_schedules.planning.bounds import lower_bounds
from ldt_schedules.planning.budgets import within_budget
from ldt_schedules.planning.evaluation import depths, evaluate
from ldt_schedules.planning.lowering import lower
from ldt_schedules.planning.memory import fits, peak_memory
from ldt_schedules.planning.planners import table_of
from ldt_schedules.planning.planners.auto import auto, auto_zb
from ldt_schedules.planning.planners.exact import exact
from ldt_schedules.planning.progress import Semantics
from ldt_schedules.planning.table import is_split
from tests.planning.random_problems import random_costs, random_layout, random_order, with_domain_of

BACKWARD = (Kind.B, Kind.I, Kind.W, Kind.SEND_B, Kind.RECV_B)
FIXED = ("ldt_1f1b", "gpipe", "ldt_2lap_1f1b", "one_f_one_b")
"""Planners that look at the layout alone."""
QUICK = 300
"""Effort of `auto` where any order will do."""
ROOTS = Layout.roots({"audio": 0, "vision": 1, "text": 2}, {"join": 3, "middle": 4, "last": 5})
EDGE_ROOTS = Layout.roots({"audio": 0, "vision": 0}, {"head": 0, "cloud": 1, "tail": 0})


def needs_gradient(layout):
    """The stages that some stage that is not frozen reaches, itself included: by the closure of the edges."""
    count = len(layout.stages)
    reaches = [[i == j or i in layout.stages[j].inputs for j in range(count)] for i in range(count)]
    for k in range(count):
        for i in range(count):
            for j in range(count):
                reaches[i][j] = reaches[i][j] or (reaches[i][k] and reaches[k][j])
    return {j for j in range(count) if any(reaches[i][j] and not layout.stages[i].frozen for i in range(count))}


def expected_messages(layout, microbatches):
    """How many messages each pair of ranks exchanges, by kind."""
    needed, found = needs_gradient(layout), Counter()
    for stage in layout.stages:
        for source in stage.inputs:
            for m in range(microbatches):
                ends = layout.rank_of(source, m), layout.rank_of(stage.index, m)
                if ends[0] != ends[1]:
                    found[(Kind.SEND_F, *ends)] += 1
                    found[(Kind.SEND_B, *reversed(ends))] += source in needed
    return +found


def sent(table):
    return Counter((a.kind, rank, a.peer) for rank, row in enumerate(table.ranks) for a in row if a.kind.is_send)


def require_right(table, split=False):
    """Valid; exactly the actions and messages that are needed; kept by the format."""
    layout, count = table.layout, table.num_microbatches
    needed = needs_gradient(layout)
    assert validate(table) == []
    actions = Counter((action.kind, action.stage) for row in table.ranks for action in row)
    for stage in range(len(layout.stages)):
        assert layout.has_backward(stage) == (stage in needed)
        assert actions[Kind.F, stage] == count
        whole, inputs, weights = (actions[kind, stage] for kind in (Kind.B, Kind.I, Kind.W))
        assert whole + inputs == (count if stage in needed else 0) and inputs == weights
        assert split or not inputs
        assert stage in needed or not any(actions[kind, stage] for kind in BACKWARD)
    assert sent(table) == expected_messages(layout, count)
    assert read_table(write_table(table, "json")) == table


def frozen_sets(layout):
    """From the data on, single stages in the middle, and both."""
    last = len(layout.stages) - 1
    sets = [*(range(n) for n in range(1, last + 1)), (last // 2,), (last,), (0, last // 2 + 1), (0, 1, last)]
    return [stages for stages in sets if len(set(stages)) <= last]


def counts(ranks, domains=1):
    """Microbatches: all small numbers; of many ranks, and where clouds share them out, fewer, as many and more."""
    return range(1, 11) if ranks < 5 and domains == 1 else (1, ranks, 10)


def layouts(ranks, domains):
    return {
        "u": Layout.u(ranks, domains),
        "laps": Layout.laps(ranks, 2, domains),
    }


def planned(name, problem):
    if name in ("auto", "auto_zb"):
        order = (auto if name == "auto" else auto_zb)(problem, QUICK)
        return table_of(order, problem)
    return plan_problem(name, problem)


@pytest.mark.parametrize("domains", [1, 2])
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("ranks", range(2, 7))
def test_every_small_table_of_the_fixed_planners(name, ranks, domains):
    """And dropping what nobody needs never makes a step longer: each action waits for fewer, in the same order."""
    shape = "laps" if name == "ldt_2lap_1f1b" else "u"
    for layout in [layouts(ranks, domains)[shape]] if name.startswith("ldt") else layouts(ranks, domains).values():
        for microbatches in counts(ranks, domains):
            unfrozen = plan(name, layout, microbatches)
            longest = simulate(layout, unfrozen.ranks).makespan
            sets = frozen_sets(layout)
            for frozen in sets if microbatches in (1, 5) else sets[microbatches % 3 :: 4]:
                table = plan(name, layout.freeze(frozen), microbatches)
                require_right(table)
                assert simulate(table.layout, table.ranks).makespan <= longest
                kept = [[a for a in row if a.kind is Kind.F or a.stage in needs_gradient(table.layout)]
                        for row in unfrozen.compute_order()]  # fmt: skip
                assert table.compute_order() == tuple(map(tuple, kept)), (microbatches, frozen)


@pytest.mark.parametrize("domains", [1, 2])
@pytest.mark.parametrize("name", ["auto", "auto_zb"])
@pytest.mark.parametrize("ranks", range(2, 7))
def test_every_small_table_of_the_planners_for_costs(name, ranks, domains):
    for layout in layouts(ranks, domains).values():
        for microbatches in counts(ranks, domains):
            sets = frozen_sets(layout)
            for frozen in sets if (ranks, microbatches) == (3, 4) else sets[microbatches % 3 :: 4]:
                problem = Problem(layout.freeze(frozen), microbatches, Costs(latency=1.5))
                table = planned(name, problem)
                require_right(table, split=name == "auto_zb")
                made = evaluate(name, problem, table.compute_order())
                assert made.makespan >= made.bounds.best - 1e-9


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b", "auto", "auto_zb"])
@pytest.mark.parametrize("layout", [ROOTS, EDGE_ROOTS], ids=["six ranks", "encoders on the edge"])
def test_roots(name, layout):
    """Each third number of microbatches, beginning with another one from set to set, so that all come."""
    for number, frozen in enumerate([(0,), (1,), (0, 1), (2,), (0, 1, 2), (0, 1, 2, 3), (3,), (0, 3), (4,)]):
        for microbatches in range(1 + number % 3, 11, 3):
            table = planned(name, Problem(layout.freeze(frozen), microbatches))
            require_right(table, split=name == "auto_zb")


@pytest.mark.parametrize("name", FIXED)
def test_no_rank_waits_for_ever_whatever_holds_it_up(name):
    for ranks in range(2, 6):
        layout = layouts(ranks, 1)["laps" if name == "ldt_2lap_1f1b" else "u"]
        for frozen in frozen_sets(layout):
            problem = Problem(layout.freeze(frozen), 6)
            table = lower(problem.layout, 6, PLANNERS[name](problem), prefetch=0)
            assert validate(table, Semantics.BLOCKING) == []


@pytest.mark.parametrize("seed", range(80))
def test_any_graph_any_order_any_costs(seed):
    """Random graphs, frozen at random, in any executable order: valid, never below a bound, exactly the needed messages."""
    rng = random.Random(seed)
    microbatches = rng.randint(1, 4)
    plain = with_domain_of(rng, random_layout(rng), microbatches)
    layout = plain.freeze([s.index for s in plain.stages if rng.random() < 0.6])
    needed = needs_gradient(layout)
    assert [layout.has_backward(s) for s in range(len(layout.stages))] == [
        s in needed for s in range(len(layout.stages))
    ]
    if not needed:
        layout = plain.freeze([s.index for s in plain.stages[1:]])
        needed = needs_gradient(layout)
    order = tuple(
        tuple(a for a in row if a.kind is Kind.F or a.stage in needed) for row in random_order(rng, plain, microbatches)
    )
    table = lower(layout, microbatches, order, prefetch=rng.randint(0, 2))
    require_right(table, split=True)
    costs = random_costs(rng, layout, microbatches, wires=True)
    timeline = simulate(layout, order, costs)
    caps = peak_memory(timeline, costs)
    problem = Problem(layout, microbatches, costs, caps)
    assert validate(table, problem=problem) == []
    for bounds in (lower_bounds(problem, split=True), *([] if is_split(order) else [lower_bounds(problem, False)])):
        assert timeline.makespan >= bounds.best * (1 - 1e-9) - 1e-9
    assert all(caps[rank] == 0 or set(layout.stages_on(rank)) & needed for rank in range(layout.num_ranks))


@pytest.mark.parametrize("layout", [Layout.u(2), Layout.u(3), Layout.laps(2, 2)], ids=["u2", "u3", "laps2"])
@pytest.mark.parametrize("split", [False, True])
def test_the_optimum_is_not_below_the_bound_and_planners_are_not_below_the_optimum(layout, split):
    for frozen in ([0], [0, 1], [1]):
        problem = Problem(layout.freeze(frozen), 3, Costs(latency=1.0), (3.0, *[2.0] * (layout.num_ranks - 1)))
        best = exact(problem, split, time_limit_s=20)
        assert best.is_optimal
        assert lower_bounds(problem, split).best <= best.makespan + 1e-6
        order = (auto_zb if split else auto)(problem, 20_000)
        timeline = simulate(problem.layout, order, problem.costs)
        assert fits(peak_memory(timeline, problem.costs), problem) and timeline.makespan >= best.lower_bound - 1e-6
        require_right(table_of(best.order, problem), split)


def test_by_hand():
    """u(2), the head frozen: 1 F, then 4 on the cloud's and the edge's way; nothing returns to the head."""
    table = plan("ldt_1f1b", Layout.u(2).freeze({0}), 1)
    assert [list(map(str, row)) for row in table.ranks] == [
        ["RECV_F s2 m0 <-1", "F s0 m0", "SEND_F s0 m0 ->1", "F s2 m0", "B s2 m0", "SEND_B s2 m0 ->1"],
        ["RECV_F s1 m0 <-0", "RECV_B s1 m0 <-0", "F s1 m0", "SEND_F s1 m0 ->0", "B s1 m0"],
    ]
    problem = Problem(table.layout, 1)
    assert simulate(table.layout, table.ranks).makespan == lower_bounds(problem, False).best == 3 + 2 + 2


def test_a_frozen_stage_behind_a_trained_one_passes_the_gradient_on():
    layout = Layout.u(3).freeze({1, 2})
    assert [layout.has_backward(s) for s in range(4)] == [True] * 4
    assert plan("gpipe", layout, 2).ranks == plan("gpipe", Layout.u(3), 2).ranks


def test_what_has_no_backward_holds_nothing():
    """Neither the rank, nor the budgets that are made of it, nor what a single microbatch needs; and it makes no round trip."""
    layout = Layout.u(3).freeze({0, 1})
    problem = Problem(layout, 8)
    timeline = simulate(layout, PLANNERS["ldt_1f1b"](problem), problem.costs)
    assert peak_memory(timeline, problem.costs)[1] == 0 == timeline.peak_in_flight[1]
    assert timeline.peak_in_flight[0] == timeline.peak_of_stage(0, 3) and timeline.peak_of_stage(0, 0) == 0
    tight = problem.with_caps((1.0, 0.0, 1.0))
    order = auto(tight, QUICK)
    assert validate(table_of(order, tight), problem=tight) == []
    assert [depth.stage for depth in depths(tight, evaluate("auto", tight, order))] == [2, 3]
    assert within_budget(problem, "1x").memory_cap[1] == 0
    with pytest.raises(ScheduleError, match="give rank 2 at least 1"):
        problem.with_caps((1.0, 0.0, 0.5))


def test_what_has_no_backward_needs_no_costs_for_one():
    costs = Costs(backward=(None, 2.0, 2.0), input_grad=None, weight_grad=None)
    with pytest.raises(ScheduleError, match="stage 0 has no cost for its backward"):
        Problem(Layout.u(2), 3, costs)
    problem = Problem(Layout.u(2).freeze({0}), 3, costs)
    assert problem.can_fuse and not problem.can_split and problem.is_uniform
    require_right(table_of(auto(problem, QUICK), problem))
    assert not Problem(
        Layout.u(2).freeze({0}), 3, Costs(input_grad=(1.0, None, None), weight_grad=(1.0, None, None))
    ).can_split


def test_freezing_is_of_just_these_stages():
    layout = Layout(Layout.laps(2, 2, domains=2).stages, 4, (0, 1, 1))
    frozen = layout.freeze({0, 2})
    assert [stage.frozen for stage in frozen.stages] == [True, False, True, False, False]
    assert (frozen.num_ranks, frozen.domain_of) == (4, (0, 1, 1))
    assert frozen.freeze({1}) == layout.freeze([1]) and frozen.freeze(()) == layout
    assert not frozen.same_work(layout) and frozen.same_work(layout.freeze({2, 0}))
    with pytest.raises(ScheduleError, match=r"there is no stage 7 to freeze; stages are 0\.\.4"):
        layout.freeze({1, 7})


@pytest.mark.parametrize("name", (*FIXED[:2], "auto"))
def test_with_every_stage_frozen_there_is_an_evaluation_and_nothing_to_train(name):
    layout = Layout.u(3).freeze(range(4))
    with pytest.raises(ScheduleError, match="every stage is frozen, so that there is nothing to train"):
        plan(name, layout, 3)
    table = plan(name, layout, 3, forward_only=True)
    assert table.ranks == plan(name, layout, 3, forward_only=True).ranks and validate(table) == []
    assert read_table(write_table(table, "json")) == table
    content = json.loads(write_table(table, "json"))
    del content["forward_only"]
    with pytest.raises(ScheduleError, match="nothing to train"):
        read_table(json.dumps(content))


def test_an_evaluation_is_the_same_frozen_or_not():
    for frozen in ({0}, {0, 1}, {2}):
        table = plan("ldt_1f1b", Layout.u(3).freeze(frozen), 4, forward_only=True)
        assert table.ranks == plan("ldt_1f1b", Layout.u(3), 4, forward_only=True).ranks and validate(table) == []


def with_added(table, rank, *texts):
    rows = [list(row) for row in table.ranks]
    rows[rank] += map(Action.parse, texts)
    return ScheduleTable.from_rows(table.layout, table.num_microbatches, rows)


NOBODY = "stage 1 is frozen, and so is all that feeds it: nobody needs its gradient"


@pytest.mark.parametrize(
    ("rank", "text", "check_name", "message"),
    [
        (1, "B s1 m0", "action", NOBODY),
        (1, "I s1 m0", "action", NOBODY),
        (1, "W s1 m0", "action", NOBODY),
        (1, "RECV_B s1 m0 <-2", "action", NOBODY),
        (1, "SEND_B s1 m0 ->0", "action", NOBODY),
        (2, "SEND_B s2 m0 ->1", "peer", NOBODY),
        (0, "B s0 m0", "action", "stage 0 is frozen: nobody needs its gradient"),
        (0, "RECV_B s0 m0 <-1", "action", "stage 0 is frozen: nobody needs its gradient"),
    ],
)
def test_a_backward_that_nobody_needs_is_named(rank, text, check_name, message):
    table = with_added(plan("gpipe", Layout.u(3).freeze({0, 1}), 2), rank, text)
    (violation,) = validate(table)
    assert (violation.check, violation.rank, violation.message) == (check_name, rank, message)
    with pytest.raises(ScheduleError, match="nobody needs its gradient"):
        check(table)


def test_a_stray_backward_is_refused_wherever_it_is_played():
    layout = Layout.u(2).freeze({0})
    with pytest.raises(ScheduleError, match="B s0 m0: stage 0 is frozen: nobody needs its gradient"):
        simulate(layout, plan("gpipe", Layout.u(2), 1).compute_order())


def test_a_missing_backward_is_still_missing():
    table = plan("gpipe", Layout.u(2), 2)
    rows = [[a for a in row if (a.kind, a.stage) != (Kind.B, 0)] for row in table.ranks]
    found = validate(ScheduleTable.from_rows(table.layout, 2, rows))
    assert {violation.check for violation in found} == {"incomplete", "left over"}
    problem = Problem(Layout.u(2).freeze({0}), 2)
    with pytest.raises(ScheduleError, match="or others are frozen"):
        validate(table, problem=problem)


def test_two_inputs_of_one_rank_of_which_one_is_frozen():
    """The gradient can go to one of them only, so that nothing need be said."""
    table = plan("gpipe", Layout.roots({"a": 0, "b": 0}, {"join": 1}).freeze({0}), 1)
    assert [str(a) for a in table.ranks[1] if a.peer is not None] == [
        "RECV_F s2 m0 <-0/s0", "RECV_F s2 m0 <-0/s1", "SEND_B s2 m0 ->0",
    ]  # fmt: skip
    said = [Action.parse("SEND_B s2 m0 ->0/s1") if a.kind is Kind.SEND_B else a for a in table.ranks[1]]
    assert validate(ScheduleTable.from_rows(table.layout, 1, [table.ranks[0], said])) == []
    wrong = [Action.parse("SEND_B s2 m0 ->0/s0") if a.kind is Kind.SEND_B else a for a in table.ranks[1]]
    told = [v.message for v in validate(ScheduleTable.from_rows(table.layout, 1, [table.ranks[0], wrong]))]
    assert "stage 0 is frozen: nobody needs its gradient" in told
