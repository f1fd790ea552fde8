"""What config.json says of a language model of Qwen or Llama, in our config keys, and what all of them are refused for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def said(section: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that are null: those count as absent."""
    return {key: value for key, value in section.items() if value is not None}


def with_defaults(text: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers takes, which leaves its defaults out when it saves. As many key heads as heads, if it says null."""
    given = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, **defaults, **said(text)}
    # A window that is null is none; of an absent one nobody knows yet whether it is used.
    given["sliding_window"] = text.get("sliding_window", 4096)
    if text.get("num_key_value_heads", 0) is None or "num_key_value_heads" not in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    return given


def model_section(text: Mapping[str, Any], *, tied: bool, qkv_bias: bool) -> dict[str, Any]:
    """Our config's `model`, of what `with_defaults` gives."""
    return {
        "num_layers": text["num_hidden_layers"],
        "hidden_size": text["hidden_size"],
        "ffn_hidden_size": text["intermediate_size"],
        "num_attention_heads": text["num_attention_heads"],
        "num_query_groups": text["num_key_value_heads"],
        "tie_embeddings": tied,
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "linear_bias": False,
        "qkv_bias": qkv_bias,
        "norm_eps": float(text["rms_norm_eps"]),
        "rope_theta": float(text["rope_theta"]),
    }


def language_problems(text: Mapping[str, Any]) -> list[str]:
    """What a layer here cannot do, of what `with_defaults` gives."""
    refused = []
    if text.get("hidden_act", "silu") != "silu":
        refused.append(f"hidden_act {text['hidden_act']!r} of the language model (allowed: silu)")
    if text.get("attention_dropout", 0.0):
        refused.append(f"attention_dropout {text['attention_dropout']} (allowed: 0)")
    if _slides(text):
        refused.append("use_sliding_window (set it to false, or max_window_layers to the number of layers)")
    return refused


def weights_problems(config: Mapping[str, Any]) -> list[str]:
    """Of the whole directory's config.json."""
    if config.get("quantization_config"):
        return ["quantization_config: quantized weights; give the directory of the original ones"]
    return []


def _slides(text: Mapping[str, Any]) -> bool:
    """Does a layer attend through a sliding window? The published files give a window and switch it off."""
    if "layer_types" in text:
        return any(kind != "full_attention" for kind in text["layer_types"])
    within = text.get("max_window_layers", 0) < text["num_hidden_layers"]
    return bool(text.get("use_sliding_window") and text["sliding_window"] and within)
