"""What config.json of a text model's directory says, in our config keys.

Keys that are absent have transformers' defaults. What our model would silently compute otherwise is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.huggingface.language_settings import (
    language_problems,
    model_section,
    weights_problems,
    with_defaults,
)
from ldt_schedules.megatron.rope_types import SCALING_KEYS

_ORIGINAL = "original_max_position_embeddings"


def settings(
    config: Mapping[str, Any], *, defaults: Mapping[str, Any], qkv_bias: bool = False, qk_norm: bool = False
) -> dict[str, Any]:
    """`{"vocab_size": ..., "model": {...}}`.

    Args:
        config: the content of config.json.
        defaults: of the architecture, for keys that are absent.

    Raises:
        ConfigError: everything in it that our model cannot do.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # transformers reads the older key first
    given = with_defaults(config, defaults)
    given["rope_theta"] = rope.get("rope_theta") or given["rope_theta"]
    refused = [*weights_problems(config), *language_problems(given), *_other_layers(given), *_rotary(rope, given)]
    if refused:
        raise ConfigError("config.json asks for what this model cannot do: " + "; ".join(refused))
    return {
        "vocab_size": given["vocab_size"],
        "model": {
            **model_section(given, tied=bool(config.get("tie_word_embeddings")), qkv_bias=qkv_bias),
            "head_dim": given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"],
            "qk_norm": qk_norm,
            "position_embedding": "rope",
            "rope_scaling": _scaling(rope, given),
        },
    }


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _scaling(rope: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Our `model.rope_scaling`; None where nothing is scaled. What it needs and is not there is left out."""
    kind = _kind(rope)
    if kind not in SCALING_KEYS:
        return None
    needed, allowed = SCALING_KEYS[kind]
    found = {key: float(rope[key]) for key in (needed | allowed) - {_ORIGINAL} if rope.get(key) is not None}
    if _ORIGINAL in needed:
        found[_ORIGINAL] = given.get(_ORIGINAL) or rope.get(_ORIGINAL) or given["max_position_embeddings"]
    return {"type": kind, **dict(sorted(found.items()))}


def _rotary(rope: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    kind, refused = _kind(rope), []
    if any(isinstance(value, Mapping) for value in rope.values()):
        refused.append("rotary angles of several kinds of layers (allowed: the same in all)")
    elif kind not in ("default", *SCALING_KEYS):
        refused.append(f"rope scaling {kind!r} (allowed: default, {', '.join(SCALING_KEYS)})")
    elif kind != "default":
        lacking = sorted(SCALING_KEYS[kind][0] - set(_scaling(rope, given) or ()))
        refused += [f"rope scaling {kind!r} without {key}" for key in lacking]
    part = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if part not in (None, 1.0):
        refused.append(f"partial_rotary_factor {part} (allowed: 1)")
    if kind == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim") and rope.get("attention_factor") is None:
        refused.append("mscale and mscale_all_dim of rope scaling 'yarn' (allowed: attention_factor, their quotient)")
    if kind == "yarn" and not rope.get("truncate", True):
        refused.append("truncate false of rope scaling 'yarn' (allowed: true)")
    return refused


def _other_layers(given: Mapping[str, Any]) -> list[str]:
    refused = [f"{key} true (allowed: false)" for key in ("attention_bias", "mlp_bias") if given.get(key)]
    if given.get("pretraining_tp", 1) != 1:
        refused.append(f"pretraining_tp {given['pretraining_tp']} (allowed: 1; the weights are the same)")
    if not given.get("is_causal", True):
        refused.append("is_causal false (allowed: true)")
    return refused
