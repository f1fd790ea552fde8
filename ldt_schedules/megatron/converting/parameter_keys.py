"""The key under which a checkpoint has a parameter, and the objects that Megatron expects beside the parameters.

Stock Megatron's checkpoints name a layer's two norms as Transformer Engine fuses them with the linear layer behind; its layers
without Transformer Engine take the same names, so that either reads the other's (megatron-core gpt_layer_specs.py,
`sharded_state_dict_keys_map`):

    decoder.layers.3.input_layernorm.weight      decoder.layers.3.self_attention.linear_qkv.layer_norm_weight
    decoder.layers.3.pre_mlp_layernorm.weight    decoder.layers.3.mlp.linear_fc1.layer_norm_weight
"""

from __future__ import annotations

from collections.abc import Iterable

from ldt_schedules.megatron.checkpoints.layer_keys import layer_key

_FUSED = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
_STATEFUL = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer that have an `_extra_state`: linear ones of any kind, attention of Transformer Engine's."""


def checkpoint_key(parameter: str) -> str:
    """Of a parameter by its name in the whole model.

    >>> checkpoint_key("decoder.layers.3.input_layernorm.weight")
    'decoder.layers.3.self_attention.linear_qkv.layer_norm_weight'
    """
    for ours, fused in _FUSED.items():
        parameter = parameter.replace(ours, fused)
    return parameter


def stateless_objects(parameters: Iterable[str]) -> list[str]:
    """Keys of the states of all modules, of layers that have these parameters; Megatron insists on them though they are empty."""
    found = filter(None, map(layer_key, parameters))
    towers = {(one.stacked.rpartition("layers.")[0], one.layer): None for one in found}
    return [f"{tower}layers.{layer}.{module}._extra_state/shard_0_1" for tower, layer in towers for module in _STATEFUL]
