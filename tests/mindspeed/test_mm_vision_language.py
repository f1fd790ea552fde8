"""What is asked of MindSpeed-MM's arguments and modules, on stand-ins with the attributes that are read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron import session
from ldt_schedules.mindspeed import mm_vision_language as ours
from ldt_schedules.topology import Topology


def arguments(vit: str = "qwen2vit", decoder: str = "qwen2_5_lm", **more: Any) -> SimpleNamespace:
    encoder = SimpleNamespace(vision_encoder=SimpleNamespace(model_id=vit, hidden_size=8))
    model = SimpleNamespace(image_encoder=encoder, text_decoder=SimpleNamespace(model_id=decoder, hidden_size=12))
    return SimpleNamespace(mm=SimpleNamespace(model=model), params_dtype=torch.float32, **more)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vit": "qwen3vit"}, "image_encoder.vision_encoder.model_id is 'qwen3vit'"),
        ({"decoder": "internllm"}, "text_decoder.model_id is 'internllm'"),
        (
            {"encoder_dp_balance": True, "sequence_parallel": True},
            "encoder_dp_balance, sequence_parallel: not possible",
        ),
        ({"context_parallel_size": 2}, "context_parallel_size > 1: not possible"),
    ],
)
def test_what_cannot_be_split_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        ours.microbatches_of(arguments(**changes), Topology(2))
    assert message in str(error.value)


def numbers() -> tuple[Any, ...]:
    return (
        parallel_state._MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE,
        parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK,
        parallel_state._VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE,
        parallel_state._VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK,
    )


def test_each_chunk_is_built_as_one_of_the_whole_pipeline():
    """And afterwards everything is as it was, after an error too."""
    args, asked = SimpleNamespace(pipeline_model_parallel_size=1), []

    def provider(pre_process: bool, post_process: bool) -> Any:
        asked.append((*numbers(), args.pipeline_model_parallel_size, pre_process, post_process))
        return torch.nn.Identity()

    before = numbers()
    for rank in range(2):
        assert len(ours.build_chunks(provider, args, rank, 4)) == ours.CHUNKS
    assert asked == [
        (4, rank, 3, chunk, 4, rank == chunk == 0, (rank, chunk) == (0, 2)) for rank in (0, 1) for chunk in (0, 1, 2)
    ]
    with pytest.raises(ZeroDivisionError):
        ours.build_chunks(lambda **_: 1 / 0, args, 0, 4)
    assert numbers() == before and args.pipeline_model_parallel_size == 1


def test_a_vit_layer_counts_the_layers_before_its_stage(monkeypatch):
    """Stage P stands on rank 0 again, yet all ranks of the first lap come before it."""
    seen = []
    forward = ours.layers_counted(lambda block: seen.append(numbers()[1::2]))
    forward(None)
    monkeypatch.setattr(
        session, "current", lambda: SimpleNamespace(executing=3, topology=SimpleNamespace(num_pipeline_ranks=3))
    )
    forward(None)
    assert seen[1] == (3, 0)


class Vision(torch.nn.Module):
    def __init__(self, *, first: bool, last: bool) -> None:
        super().__init__()
        self.pre_process, self.add_projector = first, last
        encoder = SimpleNamespace(hidden_size=8, params_dtype=torch.float32)
        self.config = SimpleNamespace(vision_encoder=encoder, vision_projector=SimpleNamespace(hidden_size=12))
        self.encoder, self.frozen = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).requires_grad_(False)
        self.encoder.blocks = SimpleNamespace(input_tensor=torch.zeros((0, 1, 8), requires_grad=True))

    forward = ours.nothing_seen(lambda *_: "seen")


@pytest.mark.parametrize(("first", "last", "width"), [(True, False, 8), (False, False, 8), (False, True, 12)])
def test_no_image_gives_zeros_to_every_weight(first, last, width):
    """Not None, for which a DistributedDataParallel would wait for ever."""
    vision = Vision(first=first, last=last)
    features = vision(torch.zeros((0, 0)), torch.zeros((0, 3), dtype=torch.int64))
    assert features.shape == (0, 1, width)
    features.backward(torch.zeros_like(features))
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in vision.encoder.parameters())
    assert all(weight.grad is None for weight in vision.frozen.parameters())
    given = vision.encoder.blocks.input_tensor.grad
    assert (given is None) if first else given.shape == (0, 1, 8)
    assert vision(torch.zeros((4, 0)), torch.ones((1, 3), dtype=torch.int64)) == "seen"
