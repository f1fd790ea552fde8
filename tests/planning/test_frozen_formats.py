"""Frozen stages in files and pictures: what says so, what shows it, and what cannot."""

from __future__ import annotations

import json

import pytest

from ldt_schedules.planning import (
    Costs,
    Layout,
    Problem,
    ScheduleError,
    ScheduleTable,
    Stage,
    plan,
    plan_problem,
    read_table,
    simulate,
    table_hash,
    validate,
    write_table,
)
from ldt_schedules.planning.formats import grid, problem_json, torch_csv
from tests.planning.test_frozen_stages import ROOTS, planned, require_right


def test_a_table_says_frozen_of_frozen_stages_only():
    layout = Layout.u(2)
    text, frozen = (write_table(plan("gpipe", one, 1), "json") for one in (layout, layout.freeze({0})))
    assert '"frozen"' not in text and frozen.count('"frozen": true') == 1
    table = plan("gpipe", layout.freeze({1}), 1)
    assert table.ranks == read_table(text).ranks and table_hash(table) != table_hash(read_table(text))


@pytest.mark.parametrize("value", ["yes", 1, None, []])
def test_a_value_that_is_neither_true_nor_false_is_refused_by_name(value):
    content = json.loads(write_table(plan("gpipe", Layout.u(2), 1), "json"))
    content["stages"][1]["frozen"] = value
    with pytest.raises(ScheduleError, match=r'stage number 1: "frozen" is .*; allowed are true and false'):
        read_table(json.dumps(content))
    problem = json.loads(problem_json.dumps(Problem(Layout.u(2), 1)))
    assert "frozen" not in json.dumps(problem)
    problem["stages"][2]["frozen"] = value
    with pytest.raises(ScheduleError, match=r'stage 2: "frozen" is .*; allowed are true and false'):
        problem_json.loads(json.dumps(problem))


def test_false_is_as_good_as_nothing():
    content = json.loads(write_table(plan("gpipe", Layout.u(2), 1), "json"))
    content["stages"][1]["frozen"] = False
    assert read_table(json.dumps(content)) == plan("gpipe", Layout.u(2), 1)


def test_a_problem_keeps_its_frozen_stages():
    problem = Problem(Layout.u(3, domains=2).freeze({0, 2}), 4, Costs(backward=(None, 1.0, 2.0, 2.0)))
    again = problem_json.loads(problem_json.dumps(problem))
    assert again.layout == problem.layout and problem_json.dumps(again) == problem_json.dumps(problem)
    bare = {"rank": 0, "f": 1, "frozen": True}
    content = {"ranks": 2, "microbatches": 2, "stages": [bare, {"rank": 1, "f": 1, "b": 2}]}
    require_right(plan_problem("auto", problem_json.loads(json.dumps(content))))
    content["stages"][0] = {"rank": 0, "f": 1}
    with pytest.raises(ScheduleError, match="stage 0 has no cost for its backward"):
        problem_json.loads(json.dumps(content))


@pytest.mark.parametrize("name", ["ldt_1f1b", "gpipe", "auto_zb"])
def test_grid_and_csv_show_what_has_no_backward(name):
    for ranks in (2, 3, 4):
        for microbatches in (1, 2, 5):
            for count in range(1, ranks + 1):
                table = planned(name, Problem(Layout.u(ranks).freeze(range(count)), microbatches))
                assert grid.loads(grid.dumps(table)) == table
                assert grid.loads(grid.dumps(table), table.layout) == table
                assert torch_csv.loads(torch_csv.dumps(table)) == table
                assert torch_csv.loads(torch_csv.dumps(table), table.layout) == table
    for frozen in ((0,), (1, 2), (0, 1, 2), (0, 1, 2, 3)):
        table = plan("gpipe", ROOTS.freeze(frozen), 3)
        again = grid.loads(grid.dumps(table))
        assert again.layout.same_work(table.layout) and again.ranks == table.ranks


@pytest.mark.parametrize("dumps", [grid.dumps, torch_csv.dumps])
def test_what_a_grid_and_csv_cannot_show_is_refused(dumps):
    with pytest.raises(ScheduleError, match="stage 2 is frozen and goes backward all the same.*write JSON instead"):
        dumps(plan("gpipe", Layout.u(3).freeze({0, 2}), 2))
    with pytest.raises(ScheduleError, match="stage 0 is frozen and is only evaluated.*write JSON instead"):
        dumps(plan("gpipe", Layout.u(3).freeze({0}), 2, forward_only=True))


def test_a_grid_that_contradicts_itself_is_not_taken_for_a_frozen_one():
    """All backwards of the head are missing, but the gradients are sent: an incomplete table, and the validator says so."""
    table = plan("gpipe", Layout.u(3), 2)
    text = grid.dumps(table)
    for m in range(2):
        text = text.replace(f"0,0,B,{m},", " " * 8).replace(f"0,0,RECV_B,({m},),1", " " * 17)
    again = grid.loads(text)
    assert not any(stage.frozen for stage in again.layout.stages)
    assert {violation.check for violation in validate(again)} >= {"incomplete", "unmatched"}


def test_a_stage_in_the_middle_without_backwards_is_incomplete_and_not_frozen():
    chain = Layout(tuple(Stage(s, f"s{s}", (s % 2,), (s - 1,) if s else ()) for s in range(3)))
    rows = [[a for a in row if not (a.stage == 1 and not a.kind.is_forward)] for row in plan("gpipe", chain, 2).ranks]
    again = grid.loads(grid.dumps(ScheduleTable.from_rows(chain, 2, rows)))
    assert not any(stage.frozen for stage in again.layout.stages) and validate(again) != []


@pytest.mark.parametrize("planner", ["gpipe", "auto_zb"])
def test_pictures_show_no_backward_of_it(planner):
    from ldt_schedules.planning.formats.trace_json import Trace, dumps, loads
    from ldt_schedules.rendering.panel import Panel
    from ldt_schedules.rendering.perfetto import perfetto_json
    from ldt_schedules.rendering.text import timeline_lines

    table = planned(planner, Problem(Layout.u(3).freeze({0, 1}), 3))
    timeline = simulate(table.layout, table.ranks)
    trace = Trace(table.layout, 3, timeline, "forwards")
    assert loads(dumps(trace)) == trace
    row = next(line for line in timeline_lines(table.layout, timeline) if line.startswith("cloud 1"))
    assert "F2" in row and not set("BIW") & set(row)
    events = json.loads(perfetto_json([Panel("frozen", trace)]))["traceEvents"]
    names = {event["name"] for event in events}
    assert "F s1 m0" in names and not any(name.startswith(("B s1", "I s1", "B s0", "SEND_B s2")) for name in names)
