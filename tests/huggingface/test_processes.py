"""Real Megatron modules, real tensor-parallel processes: a directory of transformers comes back, and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldt_schedules.errors import LdtError
from ldt_schedules.megatron.huggingface.directory import open_directory
from ldt_schedules.megatron.huggingface.loading import TensorParallel, load
from ldt_schedules.megatron.huggingface.saving import save
from ldt_schedules.megatron.huggingface.sizes import Sizes
from ldt_schedules.planning.lap_layers import LapLayers
from tests.helpers.workers import Workers, site_ports
from tests.huggingface.tiny import assert_same, contents
from tests.vision_language import tiny as model_case
from tests.vision_language.reference import logits_of, reference_model

pytest.importorskip("transformers", reason="transformers is not installed")

LAYERS = LapLayers((1, 2, 0, 1), (0, 2, 1, 0))
"""An edge and two cloud ranks."""


def _through_megatron(
    rank: int, size: int, ports: dict[str, int], source_path: Path, target: Path, dtype: torch.dtype
) -> dict[str, list[int]]:
    """Load the stages of each pipeline rank, save them; gives the shapes that this process holds."""
    from megatron.core import parallel_state

    from ldt_schedules.megatron.vision_language.stages import build_stage

    model_case.open_world(rank, ports, size)
    place = TensorParallel(rank, size, parallel_state.get_tensor_model_parallel_group())
    source = open_directory(source_path)
    sizes = Sizes.of(source.settings)
    layout, model = LAYERS.layout(), model_case.model(dtype, size)
    held: dict[int, dict[str, Any]] = {number: {} for number in range(LAYERS.num_ranks)}
    for stage in layout.stages:
        held[stage.ranks[0]].update(model_case.named_parameters(build_stage(model, LAYERS, stage.index)))
    holders = {name: number for number, parameters in held.items() for name in parameters}
    assert set(holders) == set(source.pairs(sizes)), set(holders) ^ set(source.pairs(sizes))
    for number, parameters in held.items():
        load(source, parameters.items(), sizes, place)
        save(target, source, parameters.items(), sizes, holders.__getitem__, number, place)
    return {name: list(values.shape) for parameters in held.values() for name, values in parameters.items()}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_directory_comes_back(tmp_path: Path, workers: Workers, size: int, dtype: torch.dtype) -> None:
    """An edge and two cloud ranks; every name of Megatron's modules is in the table, and the other way round."""
    reference_model(dtype).save_pretrained(tmp_path / "hf")
    ports = site_ports()
    shapes = workers.run(
        _through_megatron,
        [(rank, size, ports, tmp_path / "hf", tmp_path / "saved", dtype) for rank in range(size)],
        bare=True,
    )
    cut = shapes[0]["language.decoder.layers.0.mlp.linear_fc1.weight"]
    assert cut == [96 // size, 32]
    assert_same(contents(tmp_path / "hf"), contents(tmp_path / "saved"))
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 3
    assert open_directory(tmp_path / "saved").tensors == open_directory(tmp_path / "hf").tensors


def _apart(rank: int, ports: dict[str, int], path: Path) -> dict[str, tuple[float, float]]:
    """Of each batch: the largest logit, and the largest difference."""
    from ldt_schedules.megatron.vision_language.stages import UnsplitVisionLanguageModel

    model_case.open_world(rank, ports)
    theirs = reference_model(torch.float32)
    theirs.save_pretrained(path)
    ours = UnsplitVisionLanguageModel(model_case.model())
    source = open_directory(path)
    load(source, model_case.named_parameters(ours), Sizes.of(source.settings))
    found = {}
    for name, samples in model_case.BATCHES.items():
        batch = model_case.microbatch(samples)
        with torch.no_grad():
            logits = ours({key: value for key, value in batch.items() if key != "labels"})
            expected, valid = logits_of(theirs, batch), ~batch["padding"]
        found[name] = float(expected[valid].abs().max()), float((logits - expected)[valid].abs().max())
    return found


def test_the_loaded_model_computes_what_transformers_does(tmp_path: Path, workers: Workers) -> None:
    """A table with two rows exchanged would save what it read, and compute something else."""
    (found,) = workers.run(_apart, [(0, site_ports(), tmp_path / "hf")], bare=True)
    for name, (size, apart) in found.items():
        assert size > 1 and apart <= 1e-4, (name, found)


def test_a_width_that_does_not_divide(tmp_path: Path) -> None:
    reference_model(torch.float32).save_pretrained(tmp_path / "hf")
    source = open_directory(tmp_path / "hf")
    wrong = [("vision.decoder.layers.0.mlp.linear_fc1.bias", torch.empty(27))]
    with pytest.raises(
        LdtError, match=r"fc1\.bias is \[27\] on each of 3 tensor-parallel processes, the whole is \[80\]"
    ):
        load(source, wrong, Sizes.of(source.settings), TensorParallel(0, 3))
