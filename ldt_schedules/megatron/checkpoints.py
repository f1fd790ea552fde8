"""How a site's checkpoint names the layers it holds.

Megatron's distributed checkpoints stack equal layers: one key for all, a layer is a row. Such a key is complete only with
every row, and a site holds some. So the layers of a chunk get a key each, by their number in the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ldt_schedules.megatron.layer_span import span_of


def a_key_for_each_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `TransformerBlock.sharded_state_dict`."""

    def sharded_state_dict(
        self: Any, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        if span_of(self.config) is not None:
            metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        return original(self, prefix, sharded_offsets, metadata)

    return sharded_state_dict
