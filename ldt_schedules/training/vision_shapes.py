"""What a microbatch of a vision-language model is taken to be, and how many bytes its layers keep.

How many images a sample has and how large they are is data. A plan needs numbers before there is any, so every sample is
taken to have `hardware.images_per_sample` square pictures of `vision.max_pixels`:

    tokens of a side    sqrt(max_pixels) / (patch_size x merge_size), rounded down
    patches             (tokens of a side x merge_size)^2 a picture, no more than a sequence of tokens has places for

Attention is `scaled_dot_product_attention` inside segments (windows, frames, samples). It keeps no scores: its backward
computes them again, which is half of its forward. What a causal one masks is not computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.shapes import Shapes
from ldt_schedules.training.vision_parts import vit_as_model


@dataclass(frozen=True, slots=True)
class Patches:
    """Of the images of one microbatch.

    Attributes:
        count: of all of them; an average, so perhaps no whole number.
        in_window, in_frame: how many patches a patch attends to in a layer with windows and in one without, on average.
    """

    count: float
    in_window: float
    in_frame: float

    @classmethod
    def of(cls, config: TrainConfig) -> Patches:
        vision = config.vision
        token, merged = vision.patch_size * vision.merge_size, vision.merge_size**2
        side, window = max(1, math.isqrt(vision.max_pixels) // token), max(1, vision.window_size // token)
        full, rest = divmod(side, window)
        # A token of a row of windows shares its side of the window with that many tokens, on average; so for the other side.
        shared = (full * window**2 + rest**2) / side
        of_a_sample = min(config.hardware.images_per_sample * side**2, config.model.seq_length) * merged
        return cls(config.train.micro_batch_size * of_a_sample, shared**2 * merged, float(side**2 * merged))


@dataclass(frozen=True, slots=True)
class SegmentShapes(Shapes):
    """As `Shapes`, of layers with attention inside segments of several lengths: queries, keys and values are gathered by
    length, and what comes of them is put back.

    Attributes:
        rotation: bytes of an element while queries and keys are rotated.
    """

    rotation: int = 4

    @classmethod
    def of_language(cls, config: TrainConfig, site: Site) -> SegmentShapes:
        """Of the language model's layers."""
        text = Shapes.of(config, site)
        return cls(text.model, text.tokens, text.element, text.compute, text.tensor, text.sequence, text.element)

    @classmethod
    def of_vit(cls, config: TrainConfig, site: Site) -> SegmentShapes:
        """Of the ViT's layers, which rotate in fp32."""
        language = cls.of_language(config, site)
        return replace(language, model=vit_as_model(config), tokens=Patches.of(config).count, rotation=language.compute)

    def _qkv(self, recompute: str) -> float:
        """Gathered queries, keys and values, keys and values repeated for their heads. Recomputed, they come from rotated
        queries and keys, and from values that are a view of all three."""
        model = self.model
        each = 3 * model.query_width * self.element
        if recompute == "selective":
            each = self._together * self.element + (model.query_width + model.kv_width) * self.rotation
        angles = 4 * model.head_width * self.rotation
        return self.tokens * (each / self.tensor + angles)

    @property
    def _scores(self) -> float:
        """The output as it was gathered, and for each row and head the logarithm of a sum."""
        return (
            self.tokens
            * (self.model.hidden_size * self.element + self.model.num_attention_heads * self.compute)
            / self.tensor
        )

    @property
    def passing_norm(self) -> float:
        """A norm that is frozen but passes the gradient on: neither what its weight multiplies nor its output."""
        each = self.element if self.model.normalization == "LayerNorm" else self.compute + self.element
        return self.norm - self.tokens * self.model.hidden_size * each / self.sequence

    def passing_layer(self, recompute: str) -> float:
        """A layer that is frozen but passes the gradient on: nothing that linear layers alone read."""
        if recompute == "full":
            return self.stream
        read = self.tokens * (self.model.hidden_size + self.model.ffn_hidden_size) * self.element / self.tensor
        return self.layer(recompute) - 2 * (self.norm - self.passing_norm) - read

    def workspace(self, recompute: str, vocab_size: int) -> float:
        """A recomputed layer and 16-bit logits; there is no buffer of scores."""
        again = self.layer("none") - self.layer(recompute)
        logits = self.tokens * vocab_size * self.element if self.element < self.compute else 0
        return again + logits / self.tensor
