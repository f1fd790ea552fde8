"""megatron-core's GPTModel for samples of several segments: positions begin again in each.

Called as every GPTModel is, with segment numbers `[b, s]` (or None) as its `attention_mask`. Learned positions come with
`position_ids`, at the edge; rotary angles Megatron works out from a token's place in the sample, on every stage. Attention
inside a segment sees differences of angles only, so in exact arithmetic that would do. But the angles are float32: far
into a sample they are rounded otherwise than at its beginning, and a packed conversation would not be the same as one
that stands alone. So the angles of each token are taken from its place in its segment.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from ldt_schedules.megatron.segments import places


class SegmentedGPT(GPTModel):  # type: ignore[misc]
    """A GPTModel whose layers have `AttentionInSegments`."""

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        *more: Any,
        **named: Any,
    ) -> torch.Tensor:
        rotary = getattr(self, "rotary_pos_emb", None)
        if attention_mask is None or rotary is None:
            plain: torch.Tensor = super().forward(input_ids, position_ids, attention_mask, *more, **named)
            return plain
        hook = rotary.register_forward_hook(partial(_at_places, places(attention_mask)))
        try:
            output: torch.Tensor = super().forward(input_ids, position_ids, attention_mask, *more, **named)
        finally:
            hook.remove()
        return output


def _at_places(where: torch.Tensor, _module: Any, _given: Any, angles: torch.Tensor) -> torch.Tensor:
    """`[s, 1, 1, d]`, the angles of places 0, 1, ..., as `[s, b, 1, d]`, those of each token's place."""
    return angles[where.t().to(angles.device), 0]
