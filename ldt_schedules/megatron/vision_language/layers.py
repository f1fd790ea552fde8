"""The layers of both towers: megatron-core's local spec with attention inside segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ldt_schedules.megatron.compatibility import call_with_known


class Widened(torch.nn.Module):
    """In the place of a query and key norm: 16 bits become float32.

    Megatron rotates queries and keys in their own dtype, right behind this place. The reference's ViT rotates in float32.
    """

    def __init__(self, **unused: Any) -> None:
        super().__init__()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows


def block_of(attentions: Sequence[type], *, causal: bool, rotate_in_float32: bool) -> TransformerBlockSubmodules:
    """A block with one layer for each core attention of `attentions`."""
    local = call_with_known(get_gpt_layer_local_spec, normalization="RMSNorm")
    own_attention = local.submodules.self_attention
    widened = {"q_layernorm": Widened, "k_layernorm": Widened} if rotate_in_float32 else {}

    def layer(attention: type) -> Any:
        submodules = replace(own_attention.submodules, core_attention=attention, **widened)
        params = {**own_attention.params, "attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask}
        parts = replace(
            local.submodules,
            input_layernorm=WrappedTorchNorm,
            pre_mlp_layernorm=WrappedTorchNorm,
            self_attention=replace(own_attention, submodules=submodules, params=params),
        )
        return replace(local, submodules=parts)

    return TransformerBlockSubmodules(layer_specs=[layer(one) for one in attentions], layer_norm=WrappedTorchNorm)
