"""`ldt train`: what is checked before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ldt_schedules.cli import train as verb
from ldt_schedules.errors import ConfigError
from ldt_schedules.training.launcher import ChildFailed

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LDT_LAUNCHER_PID"):
        monkeypatch.delenv(name, raising=False)


def ldt_train(*arguments: str) -> object:
    app = typer.Typer()
    verb.register(app)
    return CliRunner().invoke(app, [QUICKSTART, *arguments])


def error_of(*arguments: str) -> str:
    result = ldt_train(*arguments)
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


def test_dry_run_shows_the_run_and_starts_nothing() -> None:
    result = ldt_train("--dry-run", "train.iterations=7", "train.global_batch_size=32")
    assert result.exit_code == 0, result.output
    assert "pipeline rank" in result.output
    assert "7 steps of 32 samples" in result.output
    assert "makespan" in result.output


def test_dry_run_as_json() -> None:
    result = ldt_train("--dry-run", "--json")
    run = json.loads(result.output)
    assert run["parameters"] == sum(rank["parameters"] for rank in run["ranks"])
    assert [rank["site"] for rank in run["ranks"]] == ["edge", "cloud", "cloud"]


def test_bad_config_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldt_schedules.training.launcher.run_all", lambda *_: pytest.fail("started"))
    assert "did you mean train.iterations" in error_of("train.itertions=5")
    assert "does not exist" in error_of("data.path=/nowhere/at/all.txt")
    assert "schedule.table" in error_of("schedule.table=/nowhere/at/all.json")


def test_torchrun_without_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert "--site edge or --site cloud" in error_of()


def test_too_few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    link = "link.address=127.0.0.1:29555"
    said = error_of("--site", "cloud", link)
    assert "the cloud has 2 processes" in said and "1 was started" in said
    assert "torchrun --nproc-per-node 2 -m ldt_schedules train" in said
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 were started" in error_of("--site", "cloud", link)
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "WORLD_SIZE is 'many'" in error_of("--site", "cloud", link)


def test_sites_need_a_port_both_know() -> None:
    assert "link.address is 127.0.0.1:0" in error_of("--site", "edge")


def test_no_cloud_to_run() -> None:
    assert "there is no cloud" in error_of("--site", "cloud", "sites.cloud.pipeline_ranks=0", "layers=null")


def test_exit_code_of_the_failed_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ChildFailed("cloud rank 1 failed with exit code 2; the end of its log", 2)

    monkeypatch.setattr("ldt_schedules.training.local_run.run_locally", fail)
    result = ldt_train()
    assert result.exit_code == 2
    assert "cloud rank 1 failed" in result.output


def test_a_planner_that_refuses_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, here, and not by every process on its own."""
    monkeypatch.setattr("ldt_schedules.training.local_run.run_all", lambda *arguments: pytest.fail("started"))
    assert "auto_zb" in error_of("schedule.planner=auto_zb")
    assert "schedule.memory" in error_of("schedule.planner=auto", "schedule.memory=1KiB")


def test_float64_is_not_clipped() -> None:
    """megatron-core would stop at its first step, with an assertion."""
    assert "set train.clip_grad=0" in error_of("model.precision=fp64")
    assert ldt_train("--dry-run", "model.precision=fp64", "train.clip_grad=0").exit_code == 0  # type: ignore[attr-defined]
