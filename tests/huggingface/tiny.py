"""Tiny Qwen2.5-VL directories, as transformers writes them; and whole or cut parameters of Megatron's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ldt_schedules.megatron.huggingface.directory import HuggingFaceDirectory
from ldt_schedules.megatron.huggingface.mapping import Pair
from ldt_schedules.megatron.huggingface.sizes import Sizes

CUT_ROWS = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias", "word_embeddings.weight")
CUT_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def text_config(heads: int = 4, groups: int = 2, head_dim: int = 8, layers: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 168,
        "hidden_size": heads * head_dim,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [head_dim // 2 - 2, 1, 1]},
        **more,
    }


def make(
    path: Path,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    published: bool = True,
    shard: str | None = None,
    seed: int = 1,
    **text: Any,
) -> Path:
    """Random weights, norms and biases too, saved by transformers."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    language = text_config(**text)
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": language["hidden_size"],
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "window_size": 16,
    }
    config = Qwen2_5_VLConfig(
        text_config=language, vision_config=vision, tie_word_embeddings=tied, image_token_id=160, video_token_id=161
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    options: dict[str, Any] = {} if shard is None else {"max_shard_size": shard}
    model.save_pretrained(path, save_original_format=published, **options)
    (path / "tokenizer_config.json").write_text("{}")
    (path / "notes.bin").write_bytes(b"no weights")
    return path


def contents(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, read without our code."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                assert name not in found, name
                found[name] = tensors.get_tensor(name)
    return found


def assert_same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    """Names, shapes, dtypes and bytes."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


def cut_shape(pair: Pair, size: int) -> tuple[int, ...]:
    """Of a parameter on one of `size` tensor-parallel processes, as megatron-core cuts it."""
    shape = list(pair.shape)
    if pair.megatron.endswith((*CUT_ROWS, "output_layer.weight")):
        shape[0] //= size
    elif pair.megatron.endswith(CUT_COLUMNS):
        shape[1] //= size
    return tuple(shape)


def empty_parameters(
    directory: HuggingFaceDirectory, sizes: Sizes, size: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Full of NaN: what is not filled shows."""
    pairs = directory.pairs(sizes)
    return {name: torch.full(cut_shape(pair, size), torch.nan, dtype=dtype) for name, pair in pairs.items()}
