"""config.json in our config keys: nested and flat, against transformers, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.huggingface.architectures import architecture_of
from ldt_schedules.megatron.huggingface.qwen2_5_vl_settings import settings
from ldt_schedules.megatron.huggingface.sizes import Sizes

FLAT: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "max_window_layers": 70,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}
"""Of the sizes of the published 3B model, its keys at the top."""

EXPECTED = {
    "vocab_size": 151936,
    "model": {
        "num_layers": 36,
        "hidden_size": 2048,
        "ffn_hidden_size": 11008,
        "num_attention_heads": 16,
        "num_query_groups": 2,
        "tie_embeddings": True,
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "linear_bias": False,
        "qkv_bias": True,
        "norm_eps": 1e-6,
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
    "vision": {
        "num_layers": 32,
        "hidden_size": 1280,
        "ffn_hidden_size": 3420,
        "num_attention_heads": 16,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "window_size": 112,
        "full_attention_layers": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "image_token": 151655,
        "video_token": 151656,
    },
}


def changed(**changes: Any) -> dict[str, Any]:
    """FLAT with changes; `vision_config__depth` goes one level down."""
    config = copy.deepcopy(FLAT)
    for key, value in changes.items():
        first, _, rest = key.partition("__")
        (config[first] if rest else config)[rest or first] = value
    return config


def test_published() -> None:
    assert settings(FLAT) == EXPECTED
    assert architecture_of(FLAT).settings(FLAT) == EXPECTED


def test_as_transformers_saves_it(tmp_path: Path) -> None:
    """The same file read and written by transformers: nested, `rope_parameters`, other keys left out."""
    from transformers import Qwen2_5_VLConfig

    (tmp_path / "config.json").write_text(json.dumps(FLAT))
    Qwen2_5_VLConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "nested")
    nested = json.loads((tmp_path / "nested" / "config.json").read_text())
    assert "text_config" in nested and "hidden_size" not in nested
    assert settings(nested) == EXPECTED


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    """Keys that a saved config leaves out. transformers' own defaults do not fit each other: the projector's width."""
    from transformers import Qwen2_5_VLConfig

    bare = {"architectures": FLAT["architectures"], "vision_config": {"out_hidden_size": 8192}}
    Qwen2_5_VLConfig(**bare).save_pretrained(tmp_path)
    assert settings(bare) == settings(json.loads((tmp_path / "config.json").read_text()))


def test_both_places_of_the_tie() -> None:
    nested = {
        **FLAT,
        "text_config": {k: v for k, v in FLAT.items() if k != "vision_config"},
        "tie_word_embeddings": False,
    }
    assert settings(nested)["model"]["tie_embeddings"] is True
    assert settings(changed(tie_word_embeddings=False))["model"]["tie_embeddings"] is False


def test_sizes() -> None:
    sizes = Sizes.of(settings(FLAT))
    assert (sizes.head_dim, sizes.query_size, sizes.key_size) == (128, 2048, 256)
    assert sizes.padded_vocab_size == sizes.vocab_size == 151936
    assert sizes.vision is not None
    assert (sizes.vision.qkv_size, sizes.vision.merged_size) == (3840, 5120)
    assert Sizes.of(settings(FLAT), 152064).padded_vocab_size == 152064


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope scaling 'yarn' \(allowed: default, mrope\)"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling 'linear'"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "rope scaling 'dynamic'"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}}, r"mrope_section \[16, 24, 23\] \(must sum to"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"use_sliding_window": True, "max_window_layers": 35}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' of the language model"),
    ({"vision_config__hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' of the vision encoder"),
    ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ({"head_dim": 64}, "head_dim 64"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: quantized weights"),
    ({"vision_config__in_chans": 1}, r"in_channels 1 \(allowed: 3\)"),
    ({"vision_config__out_hidden_size": 3584}, r"out_hidden_size 3584 \(must be hidden_size, 2048\)"),
    ({"vision_config__rope_parameters": {"rope_theta": 500.0}}, "rope_theta 500.0"),
    ({"vision_config__rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
    ({"vision_config__patch_size": [14, 16]}, r"vision_config\.patch_size \[14, 16\] \(allowed: one number\)"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_the_model_cannot_do(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json asks for what this model cannot do: .*{said}"):
        settings(changed(**changes))


def test_all_refusals_at_once() -> None:
    with pytest.raises(ConfigError, match="hidden_act 'relu' of the language model.*; attention_dropout 0.5"):
        settings(changed(hidden_act="relu", attention_dropout=0.5))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "max_window_layers": 36},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}},
        {"head_dim": 128},
        {"head_dim": None},
    ],
)
def test_what_changes_nothing(changes: dict[str, Any]) -> None:
    assert settings(changed(**changes)) == EXPECTED
