"""The layers of our GPT: megatron-core's local spec, with a norm that may run under sequence parallelism.

megatron-core's own torch norm refuses sequence parallelism, because nobody marks its weights: each tensor-parallel
process sees its part of the sequence only, so the gradients of these weights must be summed over the group, and
`finalize_model_grads` does that for weights with the attribute `sequence_parallel`. The norm below has it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from ldt_schedules.megatron.compatibility import call_with_known
from ldt_schedules.megatron.segment_attention import AttentionInSegments


class MarkedTorchNorm:
    """megatron-core's torch LayerNorm or RMSNorm, its weights marked for the reduction over the sequence's parts."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        unsplit = copy.copy(config)
        unsplit.sequence_parallel = False
        norm: torch.nn.Module = WrappedTorchNorm(unsplit, hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """Of a chunk with `num_layers` layers."""
    layer: ModuleSpec = call_with_known(
        get_gpt_layer_local_spec,
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    parts = layer.submodules
    norms = {name: _marked(getattr(parts, name)) for name in ("input_layernorm", "pre_mlp_layernorm")}
    attention = parts.self_attention
    of_heads = {name: _marked(getattr(attention.submodules, name)) for name in ("q_layernorm", "k_layernorm")}
    core = _segmented(attention.submodules.core_attention)
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=core, **of_heads))
    layer = replace(layer, submodules=replace(parts, self_attention=attention, **norms))
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norms["input_layernorm"])


def _marked(norm: Any) -> Any:
    """Apex's norm, where it is installed, marks its own weights."""
    return MarkedTorchNorm if norm is WrappedTorchNorm else norm


def _segmented(core: Any) -> Any:
    """Another core attention, as of context parallelism, knows no segments."""
    return AttentionInSegments if core is DotProductAttention else core
