"""`ldt verify` as users run it: exit codes, screen, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ldt_schedules.cli.app import app
from ldt_schedules.errors import ConfigError
from ldt_schedules.training.verification import gate
from tests.helpers.cli import ldt
from tests.training.test_verification import TINY, forked

QUICKSTART = Path(__file__).parent.parent.parent / "configs" / "quickstart.yaml"
FIGURES = {
    "passed",
    "max_rel_grad_error",
    "worst_parameter",
    "max_abs_loss_error",
    "weights_rel_error",
    "grad_norm_rel_error",
    "replicas_identical",
    "tolerances",
    "precision",
    "steps",
    "diagnosis",
}


@pytest.fixture
def small(tmp_path):
    """Arguments of a run of one edge and one cloud process."""
    file = tmp_path / "corpus.txt"
    file.write_text("".join(f"line {n}: {n * n} is the square of {n}\n" for n in range(1000)))
    return [str(QUICKSTART), *TINY, f"data.path={file}", "sites.cloud.pipeline_ranks=1"]


def verify(*arguments):
    """In this process; what users can mend comes as ConfigError, which the entry point turns into exit code 2."""
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def mistake(*arguments):
    result = verify(*arguments)
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


def test_a_split_run_passes(small, tmp_path):
    """One edge and one cloud process against one process; the same sums in the same order."""
    finished = ldt("verify", *small, "--steps", 2, "--keep", tmp_path / "kept")
    assert finished.returncode == 0, finished.stderr
    for part in ("PASSED: 2 steps", "allowed (fp32)", "gradients 5e-06", "copies"):
        assert part in finished.stdout
    assert "one process: 2 steps" in finished.stderr and "both sites (2 processes): 2 steps" in finished.stderr
    kept = {str(path.relative_to(tmp_path / "kept")) for path in tmp_path.glob("kept/**/*") if path.is_file()}
    assert {"reference/step-0002/edge-rank0.json", "split/step-0000/cloud-rank0.safetensors"} <= kept
    assert "split/logs/cloud-rank0.log" in kept


def test_the_self_test_sees_what_is_planted(small, workers, monkeypatch):
    monkeypatch.setattr(gate, "run_all", forked(workers))
    result = verify(*small, "--steps", 1, "--self-test", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["passed"] and figures["clean"]["passed"]
    planted = {one["name"]: one for one in figures["planted"]}
    assert list(planted) == ["missing-domain-average", "wrong-scale", "swapped-shard", "stale-weight"]
    for name, why in (("missing-domain-average", "as many replicas"), ("swapped-shard", "tensor parallelism")):
        assert why in planted[name]["not_for"]
    assert planted["wrong-scale"]["caught"] and planted["stale-weight"]["caught"]
    assert "of the edge are 2 times the reference" in planted["wrong-scale"]["says"]
    assert planted["stale-weight"]["says"] == "step 1: a weight of the cloud was not updated in step 1"
    assert "SELF-TEST PASSED: the clean run passes, 2 of 2 planted errors" in result.stderr


def test_a_wrong_run_does_not_pass(small, workers, monkeypatch):
    """Exit code 1, the figures, and what is wrong by name; tolerances can be set, and are told."""
    monkeypatch.setattr(gate, "run_all", forked(workers))
    result = verify(*small, "--steps", 1, "--plant", "stale-weight", "--tolerance", "gradients=0", "--json")
    assert result.exit_code == 1, result.output
    figures = json.loads(result.stdout)
    assert figures["tolerances"]["gradients"] == 0 and figures["tolerances"]["weights"] == 1e-6
    assert set(figures) == FIGURES and not figures["passed"]
    assert figures["max_rel_grad_error"] == 0 and figures["weights_rel_error"] > 1e-4
    (finding,) = figures["diagnosis"]
    assert finding["parameters"] == ["decoder.layers.1.self_attention.linear_proj.weight"]
    assert finding["site"] == "cloud" and finding["cause"] == "was not updated in step 1"
    assert "NOT PASSED" in result.stderr and "was not updated" in result.stderr


def test_what_a_user_can_mend(small, tmp_path, monkeypatch):
    finished = ldt("verify", *small[:-1], "sites.cloud.pipeline_ranks=0", "layers=null")
    assert finished.returncode == 2 and "nothing to verify" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "nowhere.txt" in mistake(*small, f"data.path={tmp_path / 'nowhere.txt'}")
    assert "give one of loss, gradients" in mistake(*small, "--tolerance", "gradient=1")
    assert "give one of missing-domain-average" in mistake(*small, "--plant", "gremlin")
    assert "no site has tensor parallelism" in mistake(*small, "--plant", "swapped-shard")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    assert "is not empty" in mistake(*small, "--keep", tmp_path / "used")
    assert verify(*small, "--steps", 0).exit_code == 2
    monkeypatch.setenv("RANK", "0")
    assert "without torchrun" in mistake(*small)
