"""The architectures whose directories can be read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.huggingface.decoder_only import LLAMA, QWEN2, QWEN3
from ldt_schedules.megatron.huggingface.mapping import Architecture
from ldt_schedules.megatron.huggingface.qwen2_5_vl import QWEN2_5_VL

ARCHITECTURES = {one.name: one for one in (LLAMA, QWEN2, QWEN3, QWEN2_5_VL)}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The one that config.json names.

    Raises:
        ConfigError: it names none, or none of ours.
    """
    named = (config.get("architectures") or [None])[0]
    if named not in ARCHITECTURES:
        raise ConfigError(
            f"config.json names the architecture {named!r}; known are {', '.join(sorted(ARCHITECTURES))}. "
            "Another one needs a table of its own"
        )
    return ARCHITECTURES[named]
