"""Whole runs, started as users start them; every process is real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldt_schedules.comm.ports import free_ports
from tests.helpers.cli import finish, metrics, start_training

QUICKSTART = Path(__file__).parent.parent.parent / "configs" / "quickstart.yaml"
SMALL = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.seq_length=32",
    "layers=[1,1,1,1]",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.eval_interval=2",
    "train.warmup_iterations=0",
    "train.clip_grad=0",
    "train.lr=0.003",
    "data.validation_fraction=0.2",
    "link.timeout_s=60",
]


@pytest.fixture
def text(tmp_path):
    """A small corpus, so that no time goes into tokenizing."""
    file = tmp_path / "corpus.txt"
    file.write_text("".join(f"line {n}: {n * n} is the square of {n}\n" for n in range(2000)))
    return f"data.path={file}"


def start(*arguments, environment=None):
    return start_training(QUICKSTART, *arguments, environment=environment)


def test_a_split_run_reports_the_numbers_of_an_edge_alone(tmp_path, text):
    """`ldt train` twice: three processes on two sites, and one process. Losses are equal to the last bit."""
    split_dir, alone_dir = tmp_path / "split", tmp_path / "alone"
    common = [*SMALL, text, "train.iterations=4"]
    code, out, err = finish(start(*common, f"train.output_dir={split_dir}", "--json"))
    assert code == 0, err
    summary = json.loads(out)
    alone = [*common, "layers=null", "sites.cloud.pipeline_ranks=0", f"train.output_dir={alone_dir}"]
    code, _, err_alone = finish(start(*alone))
    assert code == 0, err_alone
    split, whole = metrics(split_dir), metrics(alone_dir)
    assert [entry["event"] for entry in split] == ["step", "step", "evaluation"] * 2
    for mine, reference in zip(split, whole, strict=True):
        assert mine["loss"] == reference["loss"]
        if mine["event"] == "step":
            assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-6)
            assert not mine["skipped"]
            # 4 microbatches of [32, 2, 32] float32, activation and gradient.
            assert mine["bytes_up"] == mine["bytes_down"] == 4 * 2 * 32 * 2 * 32 * 4
    assert summary["iterations"] == 4 and summary["bytes_up"] > 0
    assert list((split_dir / "tensorboard").glob("events*"))
    for name in ("cloud-rank0", "cloud-rank1"):
        log = (split_dir / "logs" / f"{name}.log").read_text()
        assert "loss" not in log, "the cloud's log speaks of the loss"
    for screen in ("never crosses", "unigram entropy", "cloud"):
        assert screen in err


def test_two_sites_with_different_configs_both_say_which_keys(tmp_path, text):
    link, edge_port, cloud_port = free_ports(3)
    common = [*SMALL, text, "layers=[1,2,1]", "sites.cloud.pipeline_ranks=1", f"link.address=127.0.0.1:{link}"]
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    edge = start(
        *common,
        f"train.output_dir={tmp_path / 'edge'}",
        "--site",
        "edge",
        environment={**world, "MASTER_PORT": str(edge_port)},
    )
    cloud = start(
        *common,
        "data.path=/nowhere/that/exists",
        "train.lr=0.01",
        "train.clip_grad=0.5",
        "--site",
        "cloud",
        environment={**world, "MASTER_PORT": str(cloud_port)},
    )
    for code, _, err in (finish(edge), finish(cloud)):
        assert code == 2, err
        assert "different configs" in err
        assert "train.lr: edge 0.003, cloud 0.01" in err
        assert "train.clip_grad: edge 0.0, cloud 0.5" in err
        assert "data.path" not in err and "Traceback" not in err


def test_a_table_of_ones_own(tmp_path, text):
    """Plan, change the order by hand, train with it; a table for another step is refused before anything starts."""
    from ldt_schedules.planning import Layout, plan, write_table

    own = tmp_path / "own.json"
    own.write_text(write_table(plan("gpipe", Layout.u(2), 4), "json"))
    layers = ["layers=[1,2,1]", "sites.cloud.pipeline_ranks=1", f"schedule.table={own}"]
    run = [*SMALL, text, *layers, "train.iterations=2", f"train.output_dir={tmp_path / 'run'}"]
    code, _, err = finish(start(*run))
    assert code == 0, err
    assert len(metrics(tmp_path / "run")) == 3
    own.write_text(write_table(plan("gpipe", Layout.u(2), 3), "json"))
    code, _, err = finish(start(*run))
    assert code == 2
    assert "trains 3 microbatches, a training step of this run has 4" in err
