"""What the cloud is told of a vision-language microbatch: which rows of an activation belong together, and where they are.

    batch at the edge                       in the step header              batch in the cloud
    grids         [images, 3]        ────►  three numbers an image   ────►  grids
    segments      [b, s]             ────►  lengths of equal runs    ────►  segments
    position_ids  [3, b, s]          ────►  int32, compressed        ────►  position_ids
    input_ids, labels, loss_mask, pixel_values: never

So the cloud learns how many images a sample has, how large they are and where in the text they stand (the positions tell),
and where padding begins. It does not learn which words or pixels there are.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import torch

from ldt_schedules.megatron.segments import numbered, segment_lengths
from ldt_schedules.runtime.microbatch_format import Told
from ldt_schedules.runtime.told import grids_of, packed_numbers_of, patches_of, segments_of

Batch = dict[str, torch.Tensor]


def packed_positions(position_ids: torch.Tensor) -> str:
    """`[3, b, s]` as text, in int32; runs of counting numbers compress well."""
    numbers = position_ids.to("cpu", torch.int32).contiguous().numpy()
    return base64.b64encode(zlib.compress(numbers.astype("<i4").tobytes())).decode("ascii")


def positions_of(packed: object, batch: int, sequence: int) -> torch.Tensor:
    """`[3, b, s]` int64, what `packed_positions` was given."""
    raw = packed_numbers_of({"positions": packed}, "positions", 3 * batch * sequence * 4)
    return torch.frombuffer(raw, dtype=torch.int32).to(torch.int64).reshape(3, batch, sequence)


@dataclass(frozen=True)
class VisionLanguageMicrobatches:
    """The `runtime.microbatch_format.MicrobatchFormat` of a two-lap U.

    Attributes:
        joining_stage: the first stage that hands over tokens; those before it hand over patches.
        vision_width, language_width: elements of a patch and of a token.
        device: where the cloud wants its batches.
    """

    joining_stage: int
    vision_width: int
    language_width: int
    device: torch.device

    def told(self, batch: Batch) -> Told:
        return {
            "grids": batch["grids"].tolist(),
            "segments": segment_lengths(batch["segments"]),
            "positions": packed_positions(batch["position_ids"]),
        }

    def in_the_cloud(self, told: Told) -> Batch:
        segments = numbered(segments_of(told))
        batch = {
            "grids": torch.tensor(grids_of(told), dtype=torch.int64).reshape(-1, 3),
            "segments": segments,
            "position_ids": positions_of(told.get("positions"), *segments.shape),
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def shape(self, told: Told, stage: int) -> tuple[int, ...]:
        if stage < self.joining_stage:
            return patches_of(told), 1, self.vision_width
        segments = segments_of(told)
        return sum(segments[0]), len(segments), self.language_width
