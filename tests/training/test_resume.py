"""A run that is stopped and goes on is the run that was not stopped, to the last bit."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from ldt_schedules.training.config import load_config
from ldt_schedules.training.image_text.charts import default_charts
from tests.training.checkpoint_runs import QUICKSTART, run_all, tiny, whole_tensors

DROPOUT = "model.dropout=0.1"
TENSOR_1_2 = "sites.cloud.tensor_parallel=2"
TENSOR_2_1 = "sites.edge.tensor_parallel=2"
DATA_1_2 = "sites.cloud.data_parallel=2"
DISTRIBUTED = "train.distributed_optimizer=true"


def assert_same(mine, reference):
    assert len(mine) == len(reference)
    for one, other in zip(mine, reference, strict=True):
        np.testing.assert_array_equal(one.losses, other.losses[-len(one.losses) :])  # nan in the cloud
        for kind in ("weights", "state"):
            assert getattr(one, kind).keys() == getattr(other, kind).keys()
            for name, value in getattr(other, kind).items():
                np.testing.assert_array_equal(getattr(one, kind)[name], value, name)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.tie_embeddings=true", "train.async_save=true"),
        ("model.precision=bf16", TENSOR_1_2),
        ("model.precision=fp16", DATA_1_2),
        (TENSOR_2_1, DATA_1_2, "layers=[1,2,1]", "sites.cloud.pipeline_ranks=1"),
        (DISTRIBUTED, DATA_1_2, "model.precision=bf16", TENSOR_2_1, "layers=[1,2,1]", "sites.cloud.pipeline_ranks=1"),
        (DISTRIBUTED, DATA_1_2, "train.async_save=true", "layers=[1,2,1]", "sites.cloud.pipeline_ranks=1"),
        ("train.optimizer=sgd", "layers=[1,2,0,1]"),
        ("layers=[2,0,1,1]",),
        ("sites.cloud.pipeline_ranks=0", "layers=null"),
    ],
    ids=lambda overrides: " ".join(overrides) or "plain",
)
def test_a_resumed_run_is_bit_identical(workers, tmp_path, overrides):
    """Losses, weights, Adam's state, steps, loss scale, learning rates; with dropout. All of 4 steps, then the last two again."""
    whole = tiny(tmp_path, DROPOUT, *overrides)
    again = tiny(tmp_path, DROPOUT, *overrides, "train.resume=2")
    first, second = run_all(workers, whole, again)
    assert len(first[0].losses) == 4 and len(second[0].losses) == 2
    assert all(process.saved == [2, 4] for process in first) and all(process.saved == [4] for process in second)
    assert_same(second, first)


@pytest.mark.parametrize(
    ("before", "after", "precision"),
    [
        ((TENSOR_1_2,), (TENSOR_2_1,), "fp64"),
        ((), (TENSOR_1_2, DATA_1_2), "fp32"),
        ((TENSOR_2_1, DATA_1_2), (), "fp64"),
        (("sites.edge.data_parallel=2", "sites.cloud.data_parallel=2", DISTRIBUTED), (TENSOR_1_2,), "fp32"),
        ((TENSOR_1_2,), (DATA_1_2, DISTRIBUTED), "fp32"),
        ((DATA_1_2, DISTRIBUTED), (TENSOR_2_1, DATA_1_2, DISTRIBUTED), "fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "one process a stage",
)
def test_resume_into_other_sizes(workers, tmp_path, before, after, precision):
    """Weights and Adam's state two steps later, against the run that kept its sizes: 1e-6 in float32, 1e-12 in float64."""
    usual = ("layers=[1,2,1]", "sites.cloud.pipeline_ranks=1", f"model.precision={precision}", "train.lr=1e-5")
    usual += ("train.min_lr=0.0", "train.clip_grad=0.0")
    (kept,) = run_all(workers, tiny(tmp_path / "before", *usual, *before))
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    (changed,) = run_all(workers, tiny(tmp_path / "after", *usual, *after, "train.resume=2"))
    tolerance = {"fp32": 1e-6, "fp64": 1e-12}[precision]
    np.testing.assert_allclose(changed[0].losses, kept[0].losses[2:], rtol=tolerance)
    mine, reference = (
        # A distributed optimizer has a copy of each weight besides.
        {key: value for key, value in whole_tensors(tmp_path / name, 4).items() if ".param." not in key}
        for name in ("after", "before")
    )
    assert mine.keys() == reference.keys() and len(mine) == 3 * 27
    for key, value in reference.items():
        worst = np.abs(mine[key] - value).max() / np.abs(value).max()
        assert worst <= (tolerance if "exp_avg" not in key else 5 * tolerance), (key, worst)


@pytest.fixture(scope="module")
def charts(tmp_path_factory):
    """Drawn once for all runs."""
    return default_charts(tmp_path_factory.mktemp("charts"))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.tie_embeddings=true", "vision.frozen=[vit]", "sites.cloud.tensor_parallel=2", "train.async_save=true"),
        ("vision.frozen=[vit,language]",),
    ],
    ids=["plain", "tied, the cloud's ViT frozen, TP 1 and 2", "only the projector learns"],
)
def test_a_resumed_vision_language_run_is_bit_identical(workers, tmp_path, charts, overrides):
    usual = ("train.iterations=4", "train.save_interval=2", "train.keep_checkpoints=0", "train.eval_interval=0")
    usual += (
        f"data.path={charts}",
        f"train.output_dir={tmp_path}",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        *overrides,
    )
    config = QUICKSTART.with_name("qwen2_5_vl_tiny.yaml")
    whole, again = (load_config(config, [*usual, resume]) for resume in ("train.resume=never", "train.resume=2"))
    first, second = run_all(workers, whole, again)
    assert len(second[0].losses) == 2 and all(process.saved == [4] for process in second)
    assert_same(second, first)
