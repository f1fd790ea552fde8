"""What the tokenizer decides about a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """Of the edge. The cloud holds no embedding and has the defaults.

    Attributes:
        rows: of the embedding, a multiple of the edge's tensor-parallel size.
        image_token, video_token: placeholders of features.
    """

    rows: int = 128
    image_token: int = 0
    video_token: int = 1
