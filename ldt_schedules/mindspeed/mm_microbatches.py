"""What the cloud is told of a MindSpeed-MM vision-language microbatch, and the batch that MM's forward step reads there.

    batch at the edge                          in the step header             batch in the cloud
    image_grid_thw, or video_grid_thw  ────►   three numbers an image  ────►  image_grid_thw  [images, 3]
    attention_mask    [b, s]           ────►   runs of equal numbers   ────►  attention_mask  [b, s]
    position_ids      [3, b, s]        ────►   int32, compressed       ────►  position_ids    [3, b, s]
    pixel_values      [patches, …]             never                          pixel_values    [patches, 0]
    input_ids         [b, s]                   never                          input_ids       [b, s], zeros
    labels            [b, s]                   never                          (absent)

MM's `VLMModel` reads three things off tensors that the cloud must not have: from `pixel_values` the number of patches and
that there is a ViT to run, from `input_ids` the shape of the text, and, where no positions are given, the positions. So the
first is a tensor without elements, the second has the shape alone, and positions are always told: from zeros MM would
count on as if there were no image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldt_schedules.errors import LdtError
from ldt_schedules.megatron.segments import from_runs, runs
from ldt_schedules.megatron.vision_language.microbatches import packed_positions, positions_of
from ldt_schedules.runtime.microbatch_format import Told
from ldt_schedules.runtime.told import grids_of as told_grids_of
from ldt_schedules.runtime.told import patches_of, runs_of, text_shape_of

Batch = dict[str, Any]
Positions = Callable[[Mapping[str, Any], torch.Tensor], torch.Tensor]
"""`(batch, grids [images, 3]) -> position_ids [3, b, s]`, from the true tokens."""

_AUDIO = ("input_features", "feature_attention_mask")


@dataclass(frozen=True, kw_only=True)
class MmMicrobatches:
    """The `runtime.microbatch_format.MicrobatchFormat` of MM's batches: Qwen2-VL and Qwen2.5-VL, any number of images.

    Attributes:
        joining_stage: the first stage that hands over tokens, the number of pipeline ranks; those before it hand over patches.
        vision_width, language_width: elements of a patch and of a token.
        dtype: of the empty `pixel_values`; MM's ViT reads the smallest number of the type.
        device: where the cloud wants its batches.
        positions: for a batch that brings no `position_ids`.
    """

    joining_stage: int
    vision_width: int
    language_width: int
    dtype: torch.dtype
    device: torch.device
    positions: Positions

    def told(self, batch: Mapping[str, Any]) -> Told:
        """Reads `input_ids`, where positions must be made from them, and tells nothing of them but their shape.

        Raises:
            LdtError: audio; images and videos in one microbatch; patches that do not fit the grids; a mask that is not `[b, s]`.
        """
        grids = grids_of(batch)
        shape, mask = tuple(batch["input_ids"].shape), batch.get("attention_mask")
        if mask is not None and tuple(mask.shape) != shape:
            raise LdtError(f"attention_mask has the shape {tuple(mask.shape)}; of a text {shape} it must have that")
        position_ids = batch.get("position_ids")
        if position_ids is None:
            position_ids = self.positions(batch, grids)
        if tuple(position_ids.shape) != (3, *shape):
            raise LdtError(f"position_ids have the shape {tuple(position_ids.shape)}, M-RoPE's are {(3, *shape)}")
        return {
            "text": list(shape),
            "grids": grids.tolist(),
            "attention": None if mask is None else runs(mask.to(torch.int64)),
            "positions": packed_positions(position_ids),
        }

    def in_the_cloud(self, told: Told) -> Batch:
        batch, sequence = text_shape_of(told)
        grids = torch.tensor(told_grids_of(told), dtype=torch.int64).reshape(-1, 3)
        found = {
            "input_ids": torch.zeros((batch, sequence), dtype=torch.int64),
            "pixel_values": torch.empty((patches_of(told), 0), dtype=self.dtype),
            "image_grid_thw": grids,
            "position_ids": positions_of(told.get("positions"), batch, sequence),
        }
        if told.get("attention") is not None:
            found["attention_mask"] = from_runs(runs_of(told, "attention", (batch, sequence)))
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def shape(self, told: Told, stage: int) -> tuple[int, ...]:
        if stage < self.joining_stage:
            return patches_of(told), 1, self.vision_width
        batch, sequence = text_shape_of(told)
        return sequence, batch, self.language_width


def grids_of(batch: Mapping[str, Any]) -> torch.Tensor:
    """`[images, 3]` (t, h, w) of a batch as MM's collator makes it; none: `[0, 3]`.

    Raises:
        LdtError: what `MmMicrobatches.told` says.
    """
    audio = [name for name in _AUDIO if batch.get(name) is not None]
    if audio:
        raise LdtError(f"the batch has {', '.join(audio)}; audio has no place in the two laps of images and text")
    kinds = [kind for kind in ("image", "video") if batch.get(f"{kind}_grid_thw") is not None]
    if len(kinds) > 1:
        raise LdtError(
            "the batch has images and videos; MindSpeed-MM's get_batch keeps the videos alone, so put them into "
            "microbatches of their own"
        )
    if not kinds:
        return torch.zeros((0, 3), dtype=torch.int64)
    grids: torch.Tensor = batch[f"{kinds[0]}_grid_thw"].reshape(-1, 3)
    # get_batch renames a video on its first reading; the batch may come here before or after.
    pixels = next(
        (batch[name] for name in ("pixel_values_videos", "pixel_values") if batch.get(name) is not None), None
    )
    rows = 0 if pixels is None else len(pixels)
    if rows != _patches(grids.tolist()):
        raise LdtError(
            f"the batch has {rows} rows of pixel values, its grids {grids.tolist()} make {_patches(grids.tolist())}"
        )
    return grids


def _patches(grids: list[list[int]]) -> int:
    return sum(t * h * w for t, h, w in grids)
