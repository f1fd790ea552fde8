"""How the three roots take several microbatches in one pass; the other stages take one at a time.

    audio    clips one below the other, padded to the longest     output rows counted from the clips' lengths
    vision   patches one after the other                          output rows counted from the images' grids
    text     rows one below the other, padded on the left         rows counted, and the padding cut off again

A microbatch without audio or without an image never comes here for that root: the runtime leaves it out. For the text root
it comes without the keys of what it lacks, so the microbatches of one pass may differ in their keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from examples.omni.samples import PADDING_TOKEN
from examples.omni.thinker import TextOutput
from ldt_schedules.runtime import Packing, PipelineStage, Rows

Inputs = Mapping[str, Tensor]
"""What a root is called with for one microbatch, by name (see `thinker`)."""


def pipeline_stage(module: torch.nn.Module, number: int, merge_size: int) -> PipelineStage:
    """Stage `number` of the thinker with the packing that its inputs need.

    Args:
        merge_size: of the vision tower: so many patches in height and in width make a token.
    """
    packings: dict[int, Packing] = {0: AudioPacking(), 1: Rows(partial(image_tokens, merge_size)), 2: TextPacking()}
    return PipelineStage(module, packings[number]) if number in packings else PipelineStage(module)


def audio_tokens(inputs: Inputs) -> int:
    """Rows of the audio root's output for one microbatch: a convolution halves the frames and rounds up, a pooling halves
    them again and rounds down, clip by clip."""
    frames = inputs["feature_attention_mask"].sum(-1)
    return int(((frames + 1) // 2 // 2).sum())


def image_tokens(merge_size: int, inputs: Inputs) -> int:
    """Rows of the vision root's output for one microbatch."""
    return int(inputs["image_grid_thw"].prod(-1).sum()) // merge_size**2


class AudioPacking(Rows):
    """The clips of all microbatches in one batch. The tower cuts the padding off before it computes anything."""

    def __init__(self) -> None:
        super().__init__(audio_tokens)

    def pack(self, inputs: Sequence[Inputs]) -> dict[str, Tensor]:
        """`input_features` `[all clips, mel bins, longest]` and `feature_attention_mask` `[all clips, longest]`."""
        return {
            name: _stacked([one[name] for one in inputs], left=False, value=0)
            for name in ("input_features", "feature_attention_mask")
        }


class TextPacking:
    """The rows of all microbatches in one batch, padded as the samples are: on the left."""

    def pack(self, inputs: Sequence[Inputs]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` `[all rows, longest]`; all images' grids and all clips' lengths, if any."""
        sizes = {
            name: torch.cat(present)
            for name in ("image_grid_thw", "audio_lengths")
            if (present := [one[name] for one in inputs if name in one])
        }
        return {
            "input_ids": _stacked([one["input_ids"] for one in inputs], left=True, value=PADDING_TOKEN),
            "attention_mask": _stacked([one["attention_mask"] for one in inputs], left=True, value=0),
            **sizes,
        }

    def split(self, output: TextOutput, inputs: Sequence[Inputs]) -> list[TextOutput]:
        """Each microbatch's rows `b` and its own last `s` tokens, of everything that the text root returns."""
        embeddings, audio_mask, image_mask, attention_mask, position_ids = output
        parts: list[TextOutput] = []
        first = 0
        for one in inputs:
            count, length = one["input_ids"].shape
            rows, tokens = slice(first, first + count), slice(embeddings.shape[1] - length, None)
            first += count
            parts.append(
                (
                    embeddings[rows, tokens],
                    audio_mask[rows, tokens],
                    image_mask[rows, tokens],
                    attention_mask[rows, tokens],
                    position_ids[:, rows, tokens],
                )
            )
        return parts


def _stacked(tensors: Sequence[Tensor], *, left: bool, value: int) -> Tensor:
    """`[rows, ..., length]` one below the other, all filled up with `value` to the longest, on the left or the right."""
    longest = max(tensor.shape[-1] for tensor in tensors)
    missing = [longest - tensor.shape[-1] for tensor in tensors]
    filled = [(count, 0) if left else (0, count) for count in missing]
    return torch.cat([pad(tensor, sides, value=value) for tensor, sides in zip(tensors, filled, strict=True)])
