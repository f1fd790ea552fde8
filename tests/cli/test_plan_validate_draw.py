"""The planning verbs as users run them: a process, its screen, its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import ldt

OMNI = Path(__file__).parents[2] / "examples" / "omni" / "omni_table.txt"


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


def test_a_table_with_several_roots(tmp_path):
    """Three encoders on ranks of their own: there is no edge, so ranks are called by their numbers."""
    for arguments in ((), ("--blocking",)):
        done = ldt("validate", OMNI, *arguments)
        assert done.returncode == 0 and "valid; 6 pipeline ranks, 4 microbatches, 128 actions" in done.stdout
    done = ldt("draw", OMNI, "--width", 120)
    assert "makespan 21, bubble 42.9% (rank 0 43%" in done.stdout and "\nrank 5  ·········T0 T1" in done.stdout
    assert "edge" not in done.stdout and "cloud" not in done.stdout
    for name, rank in (("omni.svg", ">rank 0<"), ("omni.json", '"rank 3 \\u2192 rank 4"')):
        assert ldt("draw", OMNI, "--out", tmp_path / name).returncode == 0
        text = (tmp_path / name).read_text()
        assert rank in text and "edge" not in text.replace("edgecolor", "")
    file = tmp_path / "bad.txt"
    file.write_text(OMNI.read_text().replace("0,0,SEND_F,(2,),3", "0,0,SEND_F,(2,),4"))
    for verb in ("validate", "draw"):
        bad = ldt(verb, file)
        assert bad.returncode == 2 and bad.stdout == "" and len(bad.stderr.splitlines()) == 1
        assert "line 7: the cell '0,0,SEND_F,(2,),4': stage 0 of rank 0 feeds stage 1 of rank 3" in bad.stderr


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
