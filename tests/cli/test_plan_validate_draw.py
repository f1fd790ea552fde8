"""The planning verbs as users run them: a process, its screen, its exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.cli import ldt


def test_validate(tmp_path):
    file = tmp_path / "table.json"
    ldt("plan", "--ranks", 3, "--microbatches", 4, "-o", file)
    good = ldt("validate", file)
    assert good.returncode == 0 and "valid; 3 pipeline ranks, 4 microbatches" in good.stdout
    file.write_text(file.read_text().replace('"SEND_F s1 m2 ->2",', ""))
    bad = ldt("validate", file)
    assert bad.returncode == 2
    assert "nobody sends it: no action makes the activation message of s1 m2 to s2 [unmatched]" in bad.stderr
    assert ">" in bad.stderr and "Traceback" not in bad.stderr
    as_json = json.loads(ldt("validate", file, "--json").stdout)
    assert not as_json["valid"] and {"left over", "unmatched"} <= {v["check"] for v in as_json["violations"]}


def test_draw_fits_its_width_and_draws_every_action():
    done = ldt("draw", "--ranks", 3, "--microbatches", 6, "--latency", 1, "--width", 60)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert all(len(line) <= 60 for line in lines if line[:4] in ("edge", "clou"))
    edge = "".join(line[9:] for line in lines if line.startswith("edge"))
    for label in [f"{letter}{m}" for letter in "FTtB" for m in range(6)]:
        assert edge.count(label) == 1, (label, edge)
    assert "makespan 41, bubble 41.5%" in done.stdout
    spans = json.loads(ldt("draw", "--ranks", 3, "--microbatches", 6, "--json").stdout)["spans"]
    assert len(spans) == 4 * 6 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("draw",), "--ranks 3 --microbatches 6"),
        (("draw", "nofile.json"), "nofile.json cannot be read"),
        (("draw", "nofile.json", "--ranks", 3), "not both"),
        (("validate", "nofile.json"), "nofile.json cannot be read"),
        (("plam",), "plam"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, message, tmp_path):
    done = ldt(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("verb", ["plan", "validate", "draw", "train"])
def test_help_teaches(verb):
    done = ldt(verb, "--help")
    assert done.returncode == 0 and "--" in done.stdout
    if verb != "train":
        assert "Example: ldt " + verb in done.stdout.replace("\n", " ")


def test_planning_verbs_never_load_torch():
    code = (
        "import sys\n"
        "for name in ('torch', 'megatron', 'numpy', 'yaml'): sys.modules[name] = None\n"
        "sys.argv = ['ldt', 'draw', '--ranks', '3', '--microbatches', '4']\n"
        "from ldt_schedules.cli.app import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "makespan" in done.stdout
