"""How a site's checkpoint names the layers it holds.

Megatron's distributed checkpoints may stack equal layers: one key for all, a layer is a row. Such a key is complete only
with every row, and a site holds some. So the layers of a chunk get a key each, by their number in the whole model:

    stacked     decoder.layers.mlp.linear_fc2.weight      [layers, h, f]     what Megatron writes
    one each    decoder.layers.7.mlp.linear_fc2.weight    [h, f]             what a site writes

An optimizer's tensors have the same names behind `optimizer.state.exp_avg.` and the like. A reader knows both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ldt_schedules.megatron.layer_span import span_of

_NUMBERED = re.compile(r"^(?P<before>(?:.*\.)?layers)\.(?P<layer>\d+)\.(?P<after>.+)$")
_STACKED = re.compile(r"^(?P<before>(?:.*\.)?layers)\.(?P<after>(?!\d+\.).+)$")


class LayerKey(NamedTuple):
    """A layer's key, taken apart."""

    stacked: str
    layer: int


def layer_key(key: str) -> LayerKey | None:
    """None for what is in no layer.

    >>> layer_key("optimizer.state.exp_avg.decoder.layers.7.mlp.linear_fc2.weight")
    LayerKey(stacked='optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight', layer=7)
    """
    found = _NUMBERED.match(key)
    return LayerKey(f"{found['before']}.{found['after']}", int(found["layer"])) if found else None


def is_stacked(key: str) -> bool:
    """Is it the key of a tensor of all layers?"""
    return _STACKED.match(key) is not None


def key_of_layer(stacked: str, layer: int) -> str:
    """The other way round.

    >>> key_of_layer("decoder.layers.mlp.linear_fc2.weight", 7)
    'decoder.layers.7.mlp.linear_fc2.weight'
    """
    found = _STACKED.match(stacked)
    assert found is not None, stacked
    return f"{found['before']}.{layer}.{found['after']}"


def a_key_for_each_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `TransformerBlock.sharded_state_dict`."""

    def sharded_state_dict(
        self: Any, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        if span_of(self.config) is not None:
            metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        return original(self, prefix, sharded_offsets, metadata)

    return sharded_state_dict
