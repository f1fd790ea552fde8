"""What config.json of a Qwen2.5-VL directory says, in our config keys.

The published files are flat: the language model's keys stand at the top. transformers 4.52 and later nest them in
`text_config`. Keys that are absent have transformers' defaults (it leaves those out when it saves). What our model would
silently compute otherwise is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.huggingface.language_settings import (
    language_problems,
    model_section,
    said,
    weights_problems,
    with_defaults,
)

_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "mrope_section": [16, 24, 24],
    "max_window_layers": 80,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 4,
    "out_hidden_size": 3584,
}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`{"vocab_size": ..., "model": {...}, "vision": {...}}`.

    Args:
        config: the content of config.json.

    Raises:
        ConfigError: everything in it that our model cannot do.
    """
    text = config.get("text_config") or config
    vision = {**_VISION_DEFAULTS, **said(config.get("vision_config") or {})}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    given = with_defaults(text, _TEXT_DEFAULTS)
    given["rope_theta"] = rope.get("rope_theta", given["rope_theta"])
    given["mrope_section"] = rope.get("mrope_section", given["mrope_section"])
    refused = [*_whole_model(config, given, rope), *_language(given), *_vision(vision, given)]
    if refused:
        raise ConfigError("config.json asks for what this model cannot do: " + "; ".join(refused))
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return {
        "vocab_size": given["vocab_size"],
        "model": {
            **model_section(given, tied=tied, qkv_bias=True),
            "mrope_section": list(given["mrope_section"]),
        },
        "vision": {
            **_vision_section(vision),
            "image_token": config.get("image_token_id", 151655),
            "video_token": config.get("video_token_id", 151656),
        },
    }


def _vision_section(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_layers": vision["depth"],
        "hidden_size": vision["hidden_size"],
        "ffn_hidden_size": vision["intermediate_size"],
        "num_attention_heads": vision["num_heads"],
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "window_size": vision["window_size"],
        "full_attention_layers": list(vision["fullatt_block_indexes"]),
        "tokens_per_second": vision["tokens_per_second"],
    }


def _whole_model(config: Mapping[str, Any], text: Mapping[str, Any], rope: Mapping[str, Any]) -> list[str]:
    """`mrope` and `default` are the same here: sections of the head's frequencies, unscaled."""
    refused = weights_problems(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        refused.append(f"rope scaling {kind!r} (allowed: default, mrope)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refused.append(f"partial_rotary_factor {rope['partial_rotary_factor']} (allowed: 1)")
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    if 2 * sum(text["mrope_section"]) != head_dim:
        refused.append(f"mrope_section {list(text['mrope_section'])} (must sum to half of a head's width, {head_dim})")
    return refused


def _language(text: Mapping[str, Any]) -> list[str]:
    refused = language_problems(text)
    if text.get("head_dim", 0) not in (0, text["hidden_size"] // text["num_attention_heads"]):
        refused.append(f"head_dim {text['head_dim']} (allowed: hidden_size / num_attention_heads)")
    return refused


def _vision(vision: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    refused = []
    if vision.get("hidden_act", "silu") != "silu":
        refused.append(f"hidden_act {vision['hidden_act']!r} of the vision encoder (allowed: silu)")
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    if channels != 3:
        refused.append(f"vision_config.in_channels {channels} (allowed: 3)")
    if vision["out_hidden_size"] != text["hidden_size"]:
        refused.append(
            f"vision_config.out_hidden_size {vision['out_hidden_size']} (must be hidden_size, {text['hidden_size']})"
        )
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_theta", 10000.0) != 10000.0:
        refused.append(f"vision_config's rope_theta {rope['rope_theta']} (allowed: 10000)")
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        refused.append(f"vision_config's rope_type {rope['rope_type']!r} (allowed: axial)")
    for key in ("patch_size", "temporal_patch_size"):
        if not isinstance(vision[key], int):
            refused.append(f"vision_config.{key} {vision[key]} (allowed: one number)")
    return refused
