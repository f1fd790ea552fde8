"""`ldt draw` into files, of files, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ldt_schedules.planning import Costs, Layout, plan, simulate, write_table
from ldt_schedules.planning.formats import problem_json
from ldt_schedules.planning.formats.trace_json import Trace, dumps
from ldt_schedules.planning.planners import plan_problem
from ldt_schedules.planning.problem import Problem
from tests.helpers.cli import ldt


@pytest.fixture
def files(tmp_path):
    """A plan, the problem it was made for, and a run of it that took twice as long."""
    layout = Layout.u(3)
    problem = Problem(layout, 4, Costs(forward=(1.0, 2.0, 2.0, 1.0), backward=(2.0, 4.0, 4.0, 2.0), latency=3.0))
    table = plan_problem("ldt_1f1b", problem)
    slower = Costs(forward=(2.0, 4.0, 4.0, 2.0), backward=(4.0, 8.0, 8.0, 4.0), latency=6.0)
    trace = Trace(layout, 4, simulate(layout, table.ranks, slower), "s")
    (tmp_path / "plan.json").write_text(write_table(table, "json"))
    (tmp_path / "other.json").write_text(write_table(plan("gpipe", layout, 4), "json"))
    (tmp_path / "problem.json").write_text(problem_json.dumps(problem))
    (tmp_path / "trace.json").write_text(dumps(trace))
    return tmp_path


@pytest.mark.parametrize(("name", "beginning"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("X.SVG", b"<?xml")])
def test_pictures(name, beginning, files):
    pytest.importorskip("matplotlib")
    done = ldt("draw", "plan.json", "--problem", "problem.json", "--beside", "other.json", "--out", name, cwd=files)
    assert done.returncode == 0, done.stderr
    assert (files / name).read_bytes().startswith(beginning)
    first, second, last = done.stdout.splitlines()
    assert first.startswith("plan.json: makespan ") and "lower bound" in first and second.startswith("other.json: ")
    assert last == f"drawn in {name}"


def test_a_plan_beside_its_run(files):
    pytest.importorskip("matplotlib")
    asked = ("draw", "plan.json", "--problem", "problem.json", "--unit", "s", "--beside", "trace.json", "-o", "x.svg")
    done = ldt(*asked, cwd=files)
    assert done.returncode == 0, done.stderr
    svg = (files / "x.svg").read_text()
    assert svg.count(">time (s)<") == 2 and svg.count(">edge<") == 2
    plan_line, trace_line, _ = done.stdout.splitlines()
    makespans = [float(line.split("makespan ")[1].split(" s")[0]) for line in (plan_line, trace_line)]
    assert makespans[1] == 2 * makespans[0]


def test_text_and_perfetto_files(files):
    done = ldt("draw", "trace.json", "--beside", "plan.json", "--out", "x.txt", "--width", 90, cwd=files)
    assert done.returncode == 0, done.stderr
    text = (files / "x.txt").read_text()
    assert text.startswith("trace.json\n\nedge ") and "\nplan.json\n\nedge " in text
    assert max(map(len, (line for line in text.splitlines() if line.startswith("cloud")))) <= 90
    assert ldt("draw", "trace.json", "--out", "x.json", cwd=files).returncode == 0
    events = json.loads((files / "x.json").read_text())["traceEvents"]
    assert sum(e["ph"] == "X" and e["name"].startswith("F s0 ") for e in events) == 4


def test_a_trace_is_drawn_as_measured_on_the_terminal_too(files):
    done = ldt("draw", "trace.json", cwd=files)
    assert done.returncode == 0 and done.stdout.startswith("edge")
    spans = json.loads(ldt("draw", "trace.json", "--json", cwd=files).stdout)["spans"]
    assert [span["end"] for span in spans if span["action"] == "F s0 m0"] == [2.0]


def test_costs_come_from_the_problem_or_from_the_options(files):
    def makespan(*arguments):
        done = ldt("draw", *arguments, "--json", cwd=files)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["makespan"]

    layout = Layout.u(3)
    table = plan("gpipe", layout, 4)
    slow = Costs(latency=1, bandwidth=0.25)
    assert makespan("other.json", "--latency", 1, "--bandwidth", 0.25) == simulate(layout, table.ranks, slow).makespan
    known = problem_json.loads((files / "problem.json").read_text())
    assert makespan("other.json", "--problem", "problem.json") == simulate(layout, table.ranks, known.costs).makespan
    planned = plan_problem("auto", known)
    wanted = simulate(layout, planned.ranks, known.costs).makespan
    assert makespan("--problem", "problem.json", "--schedule", "auto") == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("no.json", "--out", "x.gif"),
            "ends in '.gif'; it can end in .png (picture), .svg (picture to zoom into), .txt (text)",
        ),
        (("no.json", "--out", "x"), ".json (for ui.perfetto.dev)"),
        (("no.json", "--out", "nowhere/x.png"), "there is no directory nowhere"),
        (("no.json", "--out", "dir.txt"), "it is a directory"),
        (("no.json",), "no.json cannot be read"),
        (("plan.json", "--beside", "no.json"), "no.json cannot be read"),
        (("plan.json", "--beside", "trace.json", "--json"), "--json prints one step"),
        (("problem.json",), "problem.json: this is no table: \"format\" is 'ldt-problem/1'"),
        (("plan.json", "--problem", "trace.json"), "trace.json: unknown key 'unit'; a problem has"),
        (("plan.json", "--problem", "problem.json", "--latency", 1), "leave out --latency"),
        (("plan.json", "--unit", "s"), "give --problem too"),
        (("--problem", "problem.json", "--ranks", 3), "leave out --ranks"),
        (
            ("wide.json", "--problem", "problem.json"),
            "wide.json: its stages stand on other ranks than those of the problem",
        ),
        (("cut.json",), "cut.json: line 1"),
        (("plan.json", "--bandwidth", 0), "bandwidth of a link must be more than 0"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, message, files):
    (files / "dir.txt").mkdir()
    (files / "cut.json").write_text('{"format": "ldt-trace/1", "unit')
    (files / "wide.json").write_text(write_table(plan("gpipe", Layout.u(4), 4), "json"))
    done = ldt("draw", *arguments, cwd=files)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_without_matplotlib_the_message_comes_before_the_work(files):
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "sys.argv = ['ldt', 'draw', 'nofile.json', '--out', 'x.png']\n"
        "from ldt_schedules.cli.app import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=files, timeout=60)
    assert done.returncode == 2 and "pip install 'ldt-schedules[plot]'" in done.stderr
