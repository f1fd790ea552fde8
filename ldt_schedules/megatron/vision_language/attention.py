"""Who attends to whom in the towers of a vision-language model: two kinds of segments of the same patches.

The language model's segments are conversations and padding; its attention is `SegmentAttention` itself.
"""

from __future__ import annotations

from ldt_schedules.megatron.segment_attention import SegmentAttention


class WindowAttention(SegmentAttention):
    """A ViT layer that attends inside windows (`ImageStructure.segments`, first row)."""

    row = 0


class FrameAttention(SegmentAttention):
    """A ViT layer that attends inside whole frames (`ImageStructure.segments`, second row)."""

    row = 1
