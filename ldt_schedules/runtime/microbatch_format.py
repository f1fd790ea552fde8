"""What a model's microbatches are like where stages do not all exchange one shape `[s, b, h]`.

A text model needs none of this: every activation of a run has one shape, and the middle layers need nothing else. A
vision-language model hands over patches in its first lap and tokens in its second, as many as the images have, and its
middle layers must know where images and samples begin.

    edge     batch ──told()──► JSON ══ step header ══►    cloud     ──in_the_cloud()──► the batch of a middle stage
"""

from __future__ import annotations

from typing import Any, Protocol

Told = dict[str, Any]
"""What the cloud is told of one microbatch: JSON types only, so that nobody unpickles what the other site wrote."""


class MicrobatchFormat(Protocol):
    """How one kind of microbatch is announced. Both sites have the same one."""

    def told(self, batch: Any) -> Told:
        """What the middle layers need of a batch that the edge has read, and nothing else of it."""

    def in_the_cloud(self, told: Told) -> Any:
        """What a forward step of the cloud reads from its data iterator."""

    def shape(self, told: Told, stage: int) -> tuple[int, ...]:
        """Of the output of `stage`, whole (not a rank's part of it)."""
