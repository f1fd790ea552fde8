"""Plain Megatron checkpoints, split for two sites and merged again; two sites' checkpoints, merged for plain Megatron."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint
from ldt_schedules.megatron.converting.merging import merge
from ldt_schedules.megatron.converting.parameter_keys import checkpoint_key
from ldt_schedules.megatron.converting.parts import parts_of, reading
from ldt_schedules.megatron.converting.splitting import split
from ldt_schedules.megatron.converting.step_paths import find_step
from ldt_schedules.planning.layout import Layout
from ldt_schedules.topology import Site
from ldt_schedules.training.huggingface_model import holder
from tests.helpers.workers import Workers
from tests.megatron.plain import CASE, Result, continue_plain, save_plain
from tests.megatron.site_checkpoints import save_sites

LAYOUTS = ((1, 1), (1, 2), (2, 1), (2, 2))
"""Tensor-parallel and pipeline sizes of plain Megatron."""
LAYERS = (1, 3, 2, 0)


def silent(done: int, total: int) -> None:
    """In the place of a progress bar."""


def split_for(source: Path, site: Site, out: Path) -> Path:
    split(source, site, lambda *_: lambda name: holder(LAYERS, Layout.u(3), name), out, silent)
    return out


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """Every tensor, keys of layers numbered."""
    with reading() as reader:
        found = parts_of(open_checkpoint(find_step(path).path)).items()
        return {key: reader.tensor(part).numpy() for key, part in found}


def assert_identical(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert (value.dtype, value.shape, value.tobytes()) == (
            second[key].dtype,
            second[key].shape,
            second[key].tobytes(),
        )


def assert_close(first: dict[str, np.ndarray], second: dict[str, np.ndarray], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_allclose(value, second[key], rtol=0, atol=tolerance, err_msg=key)


@pytest.fixture(scope="module")
def plain(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], tuple[Path, Result]]:
    """Four steps in each layout, a checkpoint after two."""
    folder, found = tmp_path_factory.mktemp("plain"), {}
    for tensor, pipeline in LAYOUTS:
        path = folder / f"t{tensor}p{pipeline}"
        result = save_plain(workers, path / "iter_0000002", tensor=tensor, pipeline=pipeline, more=2)
        found[tensor, pipeline] = (path, result)
    return found


@pytest.fixture(scope="module")
def merged(plain, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """Each of them split for the sites, and merged again."""
    folder, found = tmp_path_factory.mktemp("merged"), {}
    for layout, (path, _) in plain.items():
        made = folder / path.name
        edge, cloud = (split_for(path, site, made / str(site)) for site in Site)
        merge(edge, cloud, made / "whole", silent)
        found[layout] = made / "whole"
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_read_as_the_whole_model(plain, layout) -> None:
    path, result = plain[layout]
    found = tensors_of(path)
    assert_identical(
        {key: value for key, value in found.items() if not key.startswith("optimizer.")},
        {checkpoint_key(name): value for name, value in result.saved.items()},
    )
    of_one_process = tensors_of(plain[1, 1][0])
    assert_close(found, of_one_process, 1e-5)
    assert sum(key.startswith("optimizer.state.exp_avg_sq.") for key in found) == len(result.saved)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_and_merged_again_nothing_has_changed(plain, merged, layout) -> None:
    """Tensors, the states of modules, and, of what is common, the optimizer and the schedule."""
    path, _ = plain[layout]
    assert_identical(tensors_of(path), tensors_of(merged[layout]))
    before, after = (open_checkpoint(find_step(one).path) for one in (path, merged[layout]))
    assert {key: one.shape for key, one in before.tensors.items()} == {
        key: one.shape for key, one in after.tensors.items()
    }
    assert {key for key in before.objects if "rng_state" not in key} == set(after.objects)
    for key in ("iteration", "opt_param_scheduler", "optimizer", "content_metadata", "checkpoint_version"):
        assert before.common[key] == after.common[key]
    given = vars(after.common["args"])
    assert given["num_attention_heads"] == 4 and given["consumed_train_samples"] == 16 and given["no_save_rng"]
    assert (given["tensor_model_parallel_size"], given["pipeline_model_parallel_size"]) == (1, 1)
    assert "data_path" not in given, "paths are their owner's"


@pytest.mark.parametrize(("saved", "tensor", "pipeline"), [((1, 2), 1, 1), ((1, 1), 1, 2), ((2, 2), 2, 1)])
def test_stock_megatron_goes_on_as_if_nothing_had_happened(workers, plain, merged, saved, tensor, pipeline) -> None:
    """Two Adam steps, from a merged checkpoint, in another layout than the one it was saved in."""
    _, uninterrupted = plain[saved]
    step = merged[saved] / "iter_0000002"
    continued = continue_plain(workers, step, tensor=tensor, pipeline=pipeline)
    np.testing.assert_allclose(continued.losses, uninterrupted.losses[2:], rtol=1e-6)
    assert_close(continued.weights, uninterrupted.weights, 1e-6)


def test_no_byte_of_the_other_site(plain, tmp_path) -> None:
    """Neither as it lies in a tensor, nor in an optimizer's state; and no path of the one who saved."""
    path, _ = plain[2, 2]
    whole = tensors_of(path)
    cloud, edge = (split_for(path, site, tmp_path / str(site)) for site in (Site.CLOUD, Site.EDGE))
    content = {
        site: b"".join(one.read_bytes() for one in folder.glob("iter_*/*"))
        for site, folder in (("c", cloud), ("e", edge))
    }
    for name in ("embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc2.weight", "output_layer.weight"):
        for key in (name, f"optimizer.state.exp_avg.{name}"):
            row = whole[key][3].tobytes()
            assert row in content["e"] and row not in content["c"], key
    row = whole["decoder.layers.4.mlp.linear_fc2.weight"][3].tobytes()
    assert row in content["c"] and row not in content["e"]
    assert b"/private/corpus" not in content["c"] + content["e"]
    assert {
        key.split(".")[2] for key in open_checkpoint(cloud / "iter_0000002").tensors if "decoder.layers" in key
    } <= set("12345") | {"exp_avg", "exp_avg_sq"}


def test_two_sites_trained_what_one_megatron_trains(workers, plain, tmp_path) -> None:
    """What a split run saves, merged, is what plain Megatron saves: names, shapes, dtypes, objects, and the numbers."""
    save_sites(workers, tmp_path, replace(CASE, layers=LAYERS), steps=2)
    done = merge(tmp_path / "edge", tmp_path / "cloud", tmp_path / "whole", silent)
    assert (done.iteration, done.num_layers, done.optimizer, done.notes) == (2, 6, True, ())
    path, _ = plain[1, 1]
    assert_close(tensors_of(tmp_path / "whole"), tensors_of(path), 1e-5)
    mine, theirs = (open_checkpoint(find_step(one).path) for one in (tmp_path / "whole", path))
    assert {key: (one.shape, one.dtype) for key, one in mine.tensors.items()} == {
        key: (one.shape, one.dtype) for key, one in theirs.tensors.items()
    }
    assert set(mine.objects) == {key for key in theirs.objects if "rng_state" not in key}
    assert mine.common.keys() == theirs.common.keys()
    assert mine.common["optimizer"] == theirs.common["optimizer"]
    assert mine.common["args"].num_attention_heads == 4 and mine.common["args"].swiglu


def test_in_16_bits_the_main_weights_come_along(workers, tmp_path) -> None:
    case = replace(CASE, precision="bf16")
    whole = save_plain(workers, tmp_path / "plain" / "iter_0000002", case, more=2)
    edge, cloud = (split_for(tmp_path / "plain", site, tmp_path / str(site)) for site in Site)
    merge(edge, cloud, tmp_path / "whole", silent)
    assert any(key.startswith("optimizer.state.fp32_param.") for key in open_checkpoint(cloud / "iter_0000002").tensors)
    continued = continue_plain(workers, tmp_path / "whole" / "iter_0000002", case)
    assert continued.losses == whole.losses[2:]
    assert_close(continued.weights, whole.weights, 0)


def test_the_files_are_read_by_torch_alone(merged) -> None:
    """A chunk lies in its file as torch.save writes a tensor, without what does not belong to it."""
    step = find_step(merged[1, 1]).path
    tensor = open_checkpoint(step).tensors["decoder.layers.mlp.linear_fc2.weight"]
    for chunk in tensor.chunks:
        raw = (step / chunk.stored.file).read_bytes()[chunk.stored.start :][: chunk.stored.length]
        assert tuple(torch.load(io.BytesIO(raw), weights_only=True).shape) == chunk.shape == (1, *tensor.shape[1:])
        assert chunk.stored.length < 2 * 4 * 32 * 128
