"""`ldt convert` as users run it: screens, JSON, and every mistake with its one sentence and exit code 2."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ldt_schedules.cli.app import app
from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint
from ldt_schedules.megatron.checkpoints.torch_dist_writer import ChunkWriter, write_common, write_index
from ldt_schedules.megatron.converting.parts import parts_of
from ldt_schedules.planning.errors import ScheduleError
from tests.helpers.cli import ldt

GROUP = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "lr": 0.1}
WIDTH = 16


def save(folder: Path, number: int, keys: dict[str, tuple[int, ...]], **common: object) -> Path:
    """A small checkpoint with the state of an Adam; every tensor's numbers are its own."""
    step = folder / f"iter_{number:07d}"
    step.mkdir(parents=True)
    with ChunkWriter(step, "__0_0.distcp") as writer:
        for key, shape in keys.items():
            for state in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
                writer.put(state + key, torch.randn(shape))
    assert writer.written is not None
    state = {"common_step": torch.tensor(float(number))}
    optimizer = {"param_groups": [GROUP], "state": state}
    write_common(step, {"iteration": number, "optimizer": optimizer, "opt_param_scheduler": {"num_steps": 1}, **common})
    write_index(step, [writer.written])
    return folder


def layers_of(*numbers: int) -> dict[str, tuple[int, ...]]:
    return {f"decoder.layers.{number}.mlp.linear_fc2.weight": (WIDTH, WIDTH) for number in numbers}


ENDS: dict[str, tuple[int, ...]] = {
    "embedding.word_embeddings.weight": (64, WIDTH),
    "decoder.final_layernorm.weight": (WIDTH,),
    "output_layer.weight": (64, WIDTH),
}
EDGE, CLOUD = {**ENDS, **layers_of(0, 3)}, layers_of(1, 2)
WHOLE = {**ENDS, "decoder.layers.mlp.linear_fc2.weight": (4, WIDTH, WIDTH)}


@pytest.fixture
def sites(tmp_path: Path) -> tuple[Path, Path]:
    return save(tmp_path / "edge", 5, EDGE), save(tmp_path / "cloud", 5, CLOUD)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return save(tmp_path / "whole", 5, WHOLE)


def convert(*arguments: object):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def mistake(*arguments: object) -> str:
    """What a user reads; the entry point turns it into exit code 2."""
    result = convert(*arguments)
    assert isinstance(result.exception, ConfigError | ScheduleError), result.output
    return str(result.exception)


def test_merge_and_split_in_processes(sites, tmp_path):
    """Screens and exit codes as a user has them; a mistake is one line."""
    edge, cloud = sites
    out = tmp_path / "merged"
    merged = ldt("convert", "merge", edge, cloud, out, "--json")
    assert merged.returncode == 0, merged.stderr
    figures = json.loads(merged.stdout)
    assert (figures["iteration"], figures["num_layers"], figures["num_tensors"], figures["optimizer"]) == (
        5,
        4,
        21,
        True,
    )
    assert "attention heads" in figures["notes"][0]
    refused = ldt("convert", "merge", edge, cloud, out)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"ldt: {out} is there already and not empty" in refused.stderr


def test_help_teaches():
    shown = convert("--help").output
    assert all(verb in shown for verb in ("merge", "split", "from-hf", "to-hf")) and "executed" in shown
    assert "Example: ldt convert merge" in convert("merge", "--help").output
    assert "{vit: [1," in convert("split", "--help").output


def test_screen_of_a_split(whole, tmp_path):
    result = convert("split", whole, "--site", "cloud", "--layers", "Et|t*2|tL", tmp_path / "cloud")
    assert result.exit_code == 0, result.output
    assert "cloud: step 5, 2 layers, 6 tensors, 6.1 kB, with its optimizer" in result.output
    assert set(open_checkpoint(tmp_path / "cloud" / "iter_0000005").tensors) == {
        state + key for key in CLOUD for state in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    }
    weights = convert("split", whole, "--site", "edge", "--layers", "1,2,1", tmp_path / "edge", "--weights-only")
    assert "5 tensors" in weights.output and "without optimizer" in weights.output


def test_the_newest_step_that_both_have(sites, tmp_path):
    edge, cloud = sites
    save(edge, 10, EDGE), save(edge, 15, EDGE), save(cloud, 10, CLOUD)
    assert convert("merge", edge, cloud, tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert convert("merge", edge / "iter_0000005", cloud, tmp_path / "five").exit_code == 0
    told = mistake("merge", edge / "iter_0000015", cloud / "iter_0000010", tmp_path / "no")
    assert "iter_0000015 has step 15 and" in told and "iter_0000010 step 10" in told and "same step" in told


def test_sites_that_make_no_model(sites, whole, tmp_path):
    edge, cloud = sites
    out = tmp_path / "out"
    assert f"{edge}/iter_0000005 is the edge's (it has the embedding)" in mistake("merge", cloud, edge, out)
    assert "both have the embedding" in mistake("merge", edge, whole, out)
    assert "neither is the edge's" in mistake("merge", cloud, cloud, out)
    less, more = save(tmp_path / "less", 5, layers_of(1)), save(tmp_path / "more", 5, layers_of(1, 2, 3))
    told = mistake("merge", edge, less, out)
    assert "make no whole model: missing is decoder.layers.2.mlp.linear_fc2.weight" in told and str(less) in told
    assert "both hold decoder.layers.3.mlp.linear_fc2.weight" in mistake("merge", edge, more, out)
    other = save(tmp_path / "other", 5, CLOUD, iteration=6)
    assert "of steps 5 and 6" in mistake("merge", edge, other, out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_what_is_no_checkpoint(sites, tmp_path):
    edge, cloud = sites
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert "is no directory" in mistake("merge", edge, tmp_path / "nowhere", out)
    assert "holds no complete step" in mistake("merge", edge, tmp_path / "empty", out)
    assert "a part of a model" in mistake("split", cloud, "--site", "edge", "--layers", "1,2,1", out)
    assert "merge it with the cloud's" in mistake("split", edge, "--site", "edge", "--layers", "1,2,1", out)
    file = cloud / "iter_0000005" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:3000])
    assert "is cut off" in mistake("merge", edge, cloud, out)
    assert not out.exists()


def test_how_it_is_split_must_be_said_and_fit(whole, tmp_path):
    out, config = tmp_path / "out", tmp_path / "run.yaml"
    config.write_text("model: {num_layers: 8}\nlayers: [1, 3, 3, 1]\nsites: {cloud: {pipeline_ranks: 2}}\n")
    assert "--layers 1,3,3,1 or --config run.yaml" in mistake("split", whole, "--site", "edge", out)
    both = ("--layers", "1,2,1", "--config", config)
    assert "one of them" in mistake("split", whole, "--site", "edge", *both, out)
    assert "add up to 1 + 3 + 1 = 5, but the model has 4" in mistake(
        "split", whole, "--site", "edge", "--layers", "1,3,1", out
    )
    assert "splits 8 layers, the model has 4" in mistake("split", whole, "--site", "edge", "--config", config, out)
    assert "describe 1 stages" in mistake("split", whole, "--site", "edge", "--layers", "4", out)
    assert "the cloud holds nothing" in mistake("split", whole, "--site", "cloud", "--layers", "2,0,2", out)
    config.write_text("model: {num_layers: 4}\nlayers: [1, 2, 1]\nsites: {cloud: {pipeline_ranks: 1}}\n")
    assert convert("split", whole, "--site", "edge", "--config", config, out).exit_code == 0
    assert set(parts_of(open_checkpoint(out / "iter_0000005"), weights_only=True)) == set(EDGE)


def test_an_optimizer_in_buffers(tmp_path):
    path = save(tmp_path / "whole", 5, {**WHOLE, "optimizer.distributed.dp_group_idx_0.gbuf_idx_0": (8,)})
    told = mistake("split", path, "--site", "edge", "--layers", "1,2,1", tmp_path / "out")
    assert "--dist-ckpt-optim-fully-reshardable" in told and "--weights-only" in told
    result = convert("split", path, "--site", "edge", "--layers", "1,2,1", tmp_path / "out", "--weights-only")
    assert result.exit_code == 0, result.output


def test_hugging_face_directories_that_are_none(whole, tmp_path):
    out = tmp_path / "out"
    assert "has no config.json" in mistake("from-hf", whole, out)
    assert "has no config.json" in mistake("to-hf", whole, out, "--like", whole)
    assert "4 paths are given" in mistake("to-hf", whole, whole, whole, out, "--like", whole)


def _little_space() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_no_space_left(sites, tmp_path):
    """A limit of the size of files stands for a full disk: the write fails, in the middle of a tensor."""
    edge, cloud = sites
    command = [sys.executable, "-m", "ldt_schedules", "convert", "merge", str(edge), str(cloud), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, preexec_fn=_little_space)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "__0_0.distcp cannot be written: File too large" in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
