"""`ldt plan --freeze` and what the other verbs make of such a table."""

from __future__ import annotations

import json

import pytest

from ldt_schedules.planning import Kind, Layout, Problem, read_table
from ldt_schedules.planning.formats import problem_json
from tests.helpers.cli import ldt

RUN = ("plan", "--ranks", 3, "--microbatches", 6)


def test_stages_are_named_or_numbered_and_the_table_is_right_for_the_other_verbs(tmp_path):
    tables = []
    for number, names in enumerate(("0,1", "head, cloud1")):
        file = tmp_path / f"{number}.json"
        done = ldt(*RUN, "--freeze", names, "--schedule", "ldt_1f1b", "-o", file)
        assert done.returncode == 0, done.stderr
        assert "frozen: 0 head, 1 cloud1 without a backward" in done.stdout
        tables.append(read_table(file.read_text()))
    assert tables[0] == tables[1] and tables[0].layout == Layout.u(3).freeze({0, 1})
    assert {a.stage for row in tables[0].ranks for a in row if a.kind is Kind.B} == {2, 3}
    assert ldt("validate", file).stdout.startswith(f"{file}: valid;")
    drawn = ldt("draw", file)
    assert drawn.returncode == 0 and "B" not in drawn.stdout.split("cloud 1")[1].splitlines()[0]
    for suffix in ("svg", "json"):
        assert ldt("draw", file, "-o", tmp_path / f"picture.{suffix}").returncode == 0


def test_a_frozen_stage_behind_a_trained_one_takes_half_as_long_backward(tmp_path):
    file = tmp_path / "problem.json"
    done = ldt(*RUN, "--freeze", "cloud2", "--schedule", "auto_zb", "--json", "--save-problem", file)
    assert done.returncode == 0, done.stderr
    stage = json.loads(file.read_text())["stages"][2]
    assert stage["frozen"] is True and stage["b"] == 1 and "i" not in stage and "w" not in stage
    assert problem_json.loads(file.read_text()).layout == Layout.u(3).freeze({2})
    screen = ldt(*RUN, "--freeze", "head,cloud2").stdout
    assert "frozen: 0 head without a backward; 2 cloud2 passing gradients on" in screen


def test_two_laps_of_which_the_first_is_frozen():
    run = ("plan", "--laps", 2, "--ranks", 3, "--microbatches", 8, "--latency", 1, "--json")
    frozen, trained = (json.loads(ldt(*run, *more).stdout) for more in (("--freeze", "0,1,2"), ()))
    assert frozen["makespan"] < trained["makespan"] and frozen["lower_bound"] <= frozen["makespan"]
    assert all(a < b for a, b in zip(frozen["peak_memory"], trained["peak_memory"], strict=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((*RUN, "--freeze", "vision"), "there is no stage 'vision'; give numbers or names of these: 0 head, 1 cloud1"),
        ((*RUN, "--freeze", "0,4"), "there is no stage '4'"),
        ((*RUN, "--freeze", ""), "there is no stage ''"),
        ((*RUN, "--freeze", "0,1,2,3"), "every stage is frozen, so that there is nothing to train"),
        ((*RUN, "--freeze", "0", "-o", "{tmp}/t.txt", "--forward-only"), "write JSON instead"),
        (("plan", "{tmp}/config.yaml", "--freeze", "0"), "its config says"),
        (("plan", "--problem", "{tmp}/p.json", "--freeze", "0"), 'write "frozen": true of the stage'),
    ],
)
def test_mistakes(tmp_path, options, told):
    (tmp_path / "p.json").write_text(problem_json.dumps(Problem(Layout.u(2), 2)))
    done = ldt(*(str(one).replace("{tmp}", str(tmp_path)) for one in options))
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_all_may_be_frozen_in_an_evaluation(tmp_path):
    file = tmp_path / "table.json"
    done = ldt(*RUN, "--freeze", "0,1,2,3", "--forward-only", "-o", file)
    assert done.returncode == 0, done.stderr
    assert "valid" in ldt("validate", file).stdout


def test_a_table_for_other_frozen_stages_does_not_fit_the_problem(tmp_path):
    table, problem = tmp_path / "table.json", tmp_path / "problem.json"
    assert ldt(*RUN, "--freeze", "0", "--schedule", "gpipe", "--memory", "none", "-o", table).returncode == 0
    problem.write_text(problem_json.dumps(Problem(Layout.u(3), 6)))
    for done in (ldt("validate", table, "--problem", problem), ldt("draw", table, "--problem", problem)):
        assert done.returncode == 2 and "or others are frozen" in done.stderr, done.stderr
