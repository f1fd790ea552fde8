"""`ldt convert` as users run it: screens, JSON, and every mistake with its one sentence and exit code 2."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ldt_schedules.cli.app import app
from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.site_directory import MANIFEST, Manifest
from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint
from ldt_schedules.megatron.checkpoints.torch_dist_writer import ChunkWriter, write_common, write_index
from ldt_schedules.megatron.converting.parts import parts_of
from ldt_schedules.planning.errors import ScheduleError
from tests.helpers.cli import ldt

GROUP = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "lr": 0.1}
WIDTH = 16


SCHEDULE = {"num_steps": 5, "lr_warmup_steps": 2, "lr_decay_steps": 10, "wd_incr_steps": 0, "max_lr": 0.1}
STATE = "mlp.linear_fc2._extra_state/shard_0_1"
NOTHING: dict[str, object] = {}


def save(
    folder: Path,
    number: int,
    keys: dict[str, tuple[int, ...]],
    objects: Mapping[str, object] = NOTHING,
    schedule: Mapping[str, object] = SCHEDULE,
    **common: object,
) -> Path:
    """A small checkpoint with the state of an Adam; every tensor's numbers are its own."""
    step = folder / f"iter_{number:07d}"
    step.mkdir(parents=True)
    with ChunkWriter(step, "__0_0.distcp") as writer:
        for key, shape in keys.items():
            for state in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
                writer.put(state + key, torch.randn(shape))
        for key, value in objects.items():
            writer.put_object(key, [value])
    assert writer.written is not None
    state = {"common_step": torch.tensor(float(number))}
    optimizer = {"param_groups": [GROUP], "state": state}
    write_common(step, {"iteration": number, "optimizer": optimizer, "opt_param_scheduler": schedule, **common})
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


class Hostile:
    """Pickled, it is a call: whoever loads it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def _archived(value: object) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer


def _pickled(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


@pytest.mark.parametrize("kept_as", [lambda value: value, _archived, _pickled, lambda value: {"recipe": value}])
def test_a_program_in_the_state_of_a_module(sites, tmp_path, kept_as):
    """Stock Megatron would execute it: in the checkpoint's own pickle, and where Transformer Engine has put another into it."""
    edge, _ = sites
    objects = {f"decoder.layers.1.{STATE}": kept_as(Hostile(tmp_path / "executed"))}
    cloud = save(tmp_path / "hostile", 5, CLOUD, objects)
    told = mistake("merge", edge, cloud, tmp_path / "out")
    assert "decoder.layers.1.mlp.linear_fc2._extra_state" in told and "it would call posix.mkdir" in told
    assert "--weights-only" in told and not (tmp_path / "out").exists()
    assert convert("merge", edge, cloud, tmp_path / "out", "--weights-only").exit_code == 0
    with open_checkpoint(tmp_path / "out" / "iter_0000005").reading() as reader:
        assert reader.object("decoder.layers.mlp.linear_fc2._extra_state/shard_1_4") is None
    assert not (tmp_path / "executed").exists()


def test_states_of_modules_are_written_anew(sites, tmp_path):
    """All that stock Megatron saves without FP8: nothing, an empty tensor, and None in either of two pickles."""
    edge = save(
        tmp_path / "mine", 5, EDGE, {f"decoder.layers.0.{STATE}": None, f"decoder.layers.3.{STATE}": _pickled(None)}
    )
    given = {
        f"decoder.layers.1.{STATE}": torch.empty(0, dtype=torch.uint8),
        f"decoder.layers.2.{STATE}": _archived(None),
    }
    cloud = save(tmp_path / "theirs", 5, CLOUD, given)
    result = convert("merge", edge, cloud, tmp_path / "out")
    assert result.exit_code == 0, result.output
    step = open_checkpoint(tmp_path / "out" / "iter_0000005")
    raw = {key: (step.path / one.file).read_bytes()[one.start :][: one.length] for key, one in step.objects.items()}
    # What is in the file is of this test's own making.
    found = [torch.load(io.BytesIO(raw[key]), weights_only=False)[0] for key in sorted(raw)]
    assert len(found) == 4 and found[0] is None and found[1].numel() == 0
    assert torch.load(found[2], weights_only=False) is None and pickle.loads(found[3].numpy().tobytes()) is None


def test_neither_site_replaces_what_the_other_holds(tmp_path):
    edge = save(tmp_path / "edge", 5, EDGE, {f"decoder.layers.0.{STATE}": None})
    cloud = save(tmp_path / "cloud", 5, CLOUD, {f"decoder.layers.0.{STATE}": b"another"})
    assert f"both hold decoder.layers.0.{STATE}" in mistake("merge", edge, cloud, tmp_path / "out")


def test_the_file_of_a_state_is_cut_off(sites, tmp_path):
    edge, _ = sites
    cloud = save(tmp_path / "theirs", 5, CLOUD, {f"decoder.layers.1.{STATE}": bytes(2000)})
    file = cloud / "iter_0000005" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "is cut off" in mistake("merge", edge, cloud, tmp_path / "out")


def test_links_among_the_files_of_a_site(sites, tmp_path):
    """They may lead to what is none of the other site's business."""
    edge, cloud = sites
    file = cloud / "iter_0000005" / "__0_0.distcp"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert f"{file} is a link" in mistake("merge", edge, cloud, tmp_path / "out")
    file.unlink()
    os.mkfifo(file)
    assert f"{file} is a link, a pipe" in mistake("merge", edge, cloud, tmp_path / "out")


def manifest(folder: Path, number: int, run: str, **settings: object) -> None:
    """As our trainer has written one. It names no files: their digests are another test's."""
    one = Manifest(folder.name, number, run, {}, consumed_samples=8 * number + 1, settings=settings)
    (folder / f"iter_{number:07d}" / MANIFEST).write_text(json.dumps(asdict(one)))


def schedule_of(path: Path) -> dict[str, object]:
    return dict(open_checkpoint(path / "iter_0000005").common["opt_param_scheduler"])


def test_the_schedule_is_counted_in_samples(sites, whole, tmp_path):
    """As Megatron-LM counts; its own loop's checkpoints are so already, with or without a split."""
    edge, cloud = sites
    assert convert("merge", edge, cloud, tmp_path / "theirs").exit_code == 0
    assert convert("split", whole, "--site", "edge", "--layers", "1,2,1", tmp_path / "half").exit_code == 0
    assert schedule_of(tmp_path / "theirs") == schedule_of(tmp_path / "half") == SCHEDULE
    for folder in (edge, cloud):
        manifest(folder, 5, "a run", **{"train.global_batch_size": 8})
    assert convert("merge", edge, cloud, tmp_path / "ours").exit_code == 0
    samples = {"num_steps": 41, "lr_warmup_steps": 16, "lr_decay_steps": 80, "wd_incr_steps": 0}
    assert schedule_of(tmp_path / "ours") == {**SCHEDULE, **samples}
    manifest(edge, 5, "a run")
    assert "train.global_batch_size None" in mistake("merge", edge, cloud, tmp_path / "out")


def test_the_newest_step_of_one_run(sites, tmp_path):
    edge, cloud = sites
    save(edge, 10, EDGE), save(cloud, 10, CLOUD)
    for folder, later in ((edge, "second"), (cloud, "third")):
        manifest(folder, 5, "first", **{"train.global_batch_size": 8}), manifest(folder, 10, later)
    assert convert("merge", edge, cloud, tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "5"
    told = mistake("merge", edge / "iter_0000010", cloud / "iter_0000010", tmp_path / "no")
    assert "are of different runs" in told


@pytest.mark.parametrize("out", [".", "../empty"])
def test_a_result_where_one_stands(sites, tmp_path, monkeypatch, out):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    result = convert("merge", *sites, out)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "empty" / "iter_0000005" / ".metadata").is_file()


def test_chained_optimizers(tmp_path):
    path = save(tmp_path / "whole", 5, {**WHOLE, "chained_0.optimizer.state.exp_avg.output_layer.weight": (8,)})
    told = mistake("split", path, "--site", "edge", "--layers", "1,2,1", tmp_path / "out")
    assert "several optimizers in a chain" in told and "--weights-only" in told


@pytest.mark.parametrize("chunk", [(4, WIDTH, WIDTH), (10**12, WIDTH, WIDTH), (10**12, 0)])
def test_an_index_that_promises_what_no_file_holds(sites, tmp_path, chunk):
    """As many layers as nobody could list: told before anybody tries."""
    edge, _ = sites
    cloud, key = tmp_path / "promises" / "iter_0000005", "decoder.layers.mlp.linear_fc1.weight"
    cloud.mkdir(parents=True)
    with ChunkWriter(cloud, "__0_0.distcp") as writer:
        writer.put(key, torch.zeros(4, WIDTH, WIDTH), shape=(10**12, WIDTH, WIDTH))
    assert writer.written is not None
    (entry,) = writer.written.entries
    shape = (10**12, *chunk[1:])
    entry = replace(entry, chunk=replace(entry.chunk, offsets=(0,) * len(chunk), shape=chunk), shape=shape)
    write_common(cloud, {"iteration": 5})
    write_index(cloud, [replace(writer.written, entries=(entry,))])
    told = mistake("merge", edge, cloud, tmp_path / "out")
    assert key in told and ("do not make up" in told or "its index promises" in told)


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
