"""The tables of models of text alone: Qwen2.5 (and Qwen2), Qwen3, Llama 3.

    Qwen2ForCausalLM    biases of q, k and v
    Qwen3ForCausalLM    no biases; a norm of each head's q and k; heads of a width of their own
    LlamaForCausalLM    neither

Everything else is the same: `decoder_layers.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ldt_schedules.megatron.huggingface.decoder_layers import ends, layer
from ldt_schedules.megatron.huggingface.decoder_only_settings import settings
from ldt_schedules.megatron.huggingface.mapping import Architecture

_QWEN_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
}
_LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
"""transformers' configuration_qwen2.py, configuration_qwen3.py and configuration_llama.py."""


def _architecture(name: str, defaults: dict[str, Any], **has: bool) -> Architecture:
    return Architecture(
        name=name,
        once=ends(),
        layers={"num_layers": layer(**has)},
        settings=partial(settings, defaults=defaults, **has),
    )


QWEN2 = _architecture("Qwen2ForCausalLM", _QWEN_DEFAULTS, qkv_bias=True)
QWEN3 = _architecture("Qwen3ForCausalLM", {**_QWEN_DEFAULTS, "head_dim": 128}, qk_norm=True)
LLAMA = _architecture("LlamaForCausalLM", _LLAMA_DEFAULTS)
