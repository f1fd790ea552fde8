"""`ldt plan` and `ldt validate --problem` as users run them."""

from __future__ import annotations

import json

import pytest

from ldt_schedules.planning import Costs, Layout, Problem, plan, read_table, simulate, table_hash
from ldt_schedules.planning.bounds import lower_bounds
from ldt_schedules.planning.budgets import published_peaks
from ldt_schedules.planning.formats import problem_json
from ldt_schedules.planning.memory import peak_memory
from tests.helpers.cli import ldt

FORWARD = (1.0, 2.0, 2.0, 1.0)
PROBLEM = Problem(
    Layout.u(3),
    6,
    Costs(
        forward=FORWARD,
        backward=tuple(2 * time for time in FORWARD),
        input_grad=FORWARD,
        weight_grad=FORWARD,
        latency=4.0,
    ),
    (10.0, 4.0, 4.0),
)


@pytest.fixture
def problem_file(tmp_path):
    file = tmp_path / "problem.json"
    file.write_text(problem_json.dumps(PROBLEM))
    return file


def test_the_published_order_is_written_as_planned(tmp_path):
    file = tmp_path / "table.json"
    run = ("plan", "--ranks", 4, "--microbatches", 8, "--latency", 2, "--schedule", "ldt_1f1b")
    done = ldt(*run, "-o", file, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["peak_in_flight"] == [6, 4, 3, 2] and figures["file"] == str(file)
    table = read_table(file.read_text())
    assert table.compute_order() == plan("ldt_1f1b", Layout.u(4), 8).compute_order()
    assert figures["hash"] == table_hash(table)


@pytest.mark.parametrize("schedule", ["auto", "auto_zb", "ldt_1f1b", "gpipe", "one_f_one_b"])
def test_a_problem_is_planned_within_its_memory_and_reported_truly(tmp_path, problem_file, schedule):
    file = tmp_path / "table.json"
    options = ("--memory", "none") if schedule == "gpipe" else ()
    if schedule == "gpipe":
        problem_file.write_text(problem_json.dumps(PROBLEM.with_caps(())))
    done = ldt("plan", "--problem", problem_file, "--schedule", schedule, "--out", file, "--json", *options)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    table = read_table(file.read_text())
    timeline = simulate(table.layout, table.ranks, PROBLEM.costs)
    assert figures["makespan"] == timeline.makespan
    assert figures["peak_memory"] == list(peak_memory(timeline, PROBLEM.costs))
    assert figures["bubble"] == timeline.bubble
    problem = problem_json.loads(problem_file.read_text())
    assert figures["lower_bound"] == lower_bounds(problem, split=schedule == "auto_zb").best <= figures["makespan"]
    checked = ldt("validate", file, "--problem", problem_file, "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["makespan"] == timeline.makespan


def test_without_a_schedule_candidates_are_compared_and_the_fastest_fused_one_is_taken(tmp_path):
    done = ldt("plan", "--ranks", 4, "--microbatches", 8, "--latency", 4, "--json")
    figures = json.loads(done.stdout)
    steps = {candidate["schedule"]: candidate["makespan"] for candidate in figures["candidates"]}
    assert set(steps) == {"ldt_1f1b", "gpipe", "auto", "auto_zb"}
    assert figures["schedule"] == "auto" and figures["makespan"] == steps["auto"] < steps["ldt_1f1b"]
    screen = ldt("plan", "--ranks", 4, "--microbatches", 8, "--latency", 4)
    assert "What more memory would buy" in screen.stdout and "hide the round trip" in screen.stdout
    assert "over the proven bound" in screen.stdout


def test_budgets_reach_the_planner():
    layout = Layout.u(4)
    peaks = published_peaks(Problem(layout, 16))
    run = ("plan", "--ranks", 4, "--microbatches", 16, "--latency", 8, "--schedule", "auto", "--json", "--memory")
    steps = []
    for budget, times in (("1x", 1), ("2x", 2), ("none", 1e9)):
        figures = json.loads(ldt(*run, budget).stdout)
        assert all(held <= times * peak for held, peak in zip(figures["peak_memory"], peaks, strict=True))
        steps.append(figures["makespan"])
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1]


@pytest.mark.parametrize(("name", "form"), [("t.json", "json"), ("t.txt", "grid"), ("t.csv", "csv")])
def test_the_file_name_says_the_format(tmp_path, name, form):
    file = tmp_path / name
    run = ("plan", "--ranks", 3, "--microbatches", 4, "--schedule", "gpipe", "--memory", "none", "--out", file)
    assert ldt(*run).returncode == 0
    assert read_table(file.read_text()).ranks == read_table(_as_json(tmp_path)).ranks
    assert ldt("validate", file).returncode == 0


def _as_json(tmp_path):
    file = tmp_path / "reference.json"
    ldt("plan", "--ranks", 3, "--microbatches", 4, "--schedule", "gpipe", "--memory", "none", "--out", file)
    return file.read_text()


def test_a_config_is_planned_from_its_shapes(tmp_path):
    done = ldt("plan", "configs/quickstart.yaml", "hardware.link_latency_ms=200", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["time_unit"] == "s" and figures["memory_unit"] == "B" and figures["ranks"] == 3
    near = json.loads(ldt("plan", "configs/quickstart.yaml", "hardware.link_latency_ms=0", "--json").stdout)
    assert figures["makespan"] >= near["makespan"] + 0.7, "four crossings of 0.2 s each do not come for nothing"
    assert min(figures["peak_memory"]) > 2**20
    screen = ldt("plan", "configs/quickstart.yaml")
    assert "Stages of one microbatch" in screen.stdout and "Mbit/s" in screen.stdout


def test_a_table_of_another_problem_or_over_its_memory_is_refused(tmp_path, problem_file):
    file = tmp_path / "table.json"
    ldt("plan", "--ranks", 3, "--microbatches", 6, "--schedule", "gpipe", "--memory", "none", "--out", file)
    done = ldt("validate", file, "--problem", problem_file)
    assert done.returncode == 2 and "holds 5 of memory here, but the rank may hold 4 [memory]" in done.stderr
    ldt("plan", "--ranks", 3, "--microbatches", 5, "--schedule", "gpipe", "--memory", "none", "--out", file)
    done = ldt("validate", file, "--problem", problem_file)
    assert done.returncode == 2 and "5 microbatches, the problem 6" in done.stderr


BAD_PROBLEMS = {
    "memory below one microbatch": (
        {"mem_cap": [1, 4, 4]},
        "rank 0 may hold 1, but a single microbatch in flight needs 2",
    ),
    "a cycle": ({"edges": [[0, 1], [1, 2], [2, 1], [2, 3]]}, "stages [1, 2, 3] wait for each other"),
    "no such rank": ({"ranks": 2}, "stage 2 stands on rank 2, which does not exist; ranks are 0..1"),
    "bandwidth 0": (
        {"links": [{"src": 0, "dst": 1, "bandwidth": 0}]},
        "bandwidth of a link must be more than 0, got 0",
    ),
}


@pytest.mark.parametrize("what", BAD_PROBLEMS)
def test_a_problem_that_cannot_be_met_is_refused_with_stage_and_number(problem_file, what):
    change, message = BAD_PROBLEMS[what]
    problem_file.write_text(json.dumps({**json.loads(problem_file.read_text()), **change}))
    done = ldt("plan", "--problem", problem_file, "--schedule", "auto", "--json")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert message in done.stderr and str(problem_file) in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", 4, "--microbatches", 8, "--schedule", "ldt_1fb1"), "did you mean ldt_1f1b"),
        (("--ranks", 1, "--microbatches", 8), "at least 2 pipeline ranks"),
        (("--ranks", 3, "--microbatches", 0), "at least 1 microbatch, got 0"),
        (("--ranks", 3, "--microbatches", 2, "--latency", -1), "latency must be a finite number of 0 or more"),
        (("--ranks", 3, "--microbatches", 2, "--bandwidth", 0), "bandwidth of a link must be more than 0"),
        (("--ranks", 3, "--microbatches", 2, "--memory", "lots"), "cannot read the memory budget 'lots'"),
        (("--ranks", 3, "--microbatches", 9, "--memory", "1", "--schedule", "auto"), "give rank 0 at least 2"),
        (("--ranks", 3, "--microbatches", 9, "--schedule", "gpipe"), "does not fit into the memory budget"),
        (("--ranks", 3, "--microbatches", 2, "--format", "xml"), "there are json, grid"),
        (("--ranks", 3, "--microbatches", 2, "-o", "/no/such/dir/t.json"), "cannot be written"),
        (("--ranks", "x", "--microbatches", 1), "valid integer"),
        (("--ranks", 3), "--ranks and --microbatches"),
        ((), "say what to plan"),
        (("nofile.yaml",), "nofile.yaml"),
        (("--problem", "nofile.json"), "nofile.json cannot be read"),
        (("--measure", "runs/x", "--ranks", 3, "--microbatches", 2), "needs the config"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, message, tmp_path):
    done = ldt("plan", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in " ".join(done.stderr.split()).replace("│ ", "").replace(" │", "")
    assert "Traceback" not in done.stderr and done.stdout == ""
