"""Segments: which tokens of a sample belong together, and what the cloud is told of them.

    segments  [b, s]   1 1 1 2 2 0 0      runs of equal numbers; which numbers they are says nothing
    lengths            [3, 2, 2]          the same in the step header
    places    [b, s]   0 1 2 0 1 0 1      where a token stands in its segment

A sample may hold several conversations, each a segment, and padding. Nobody attends out of his segment, in no layer of
either site; so the middle layers must know where each begins. The lengths are all they are told: no token, no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from ldt_schedules.runtime.microbatch_format import Told
from ldt_schedules.runtime.told import segments_of

Run = Sequence[int]
"""A number, and how often it stands there in a row."""


def runs(rows: torch.Tensor) -> list[list[Run]]:
    """The runs of equal numbers in each row of `[b, s]`."""
    return [[[value, len(list(run))] for value, run in groupby(row)] for row in rows.tolist()]


def from_runs(rows: Sequence[Sequence[Run]]) -> torch.Tensor:
    """`[b, s]` int64, what `runs` was given."""
    return torch.tensor([[value for value, length in row for _ in range(length)] for row in rows], dtype=torch.int64)


def segment_lengths(segments: torch.Tensor) -> list[list[int]]:
    """Of the runs in each row of `[b, s]`."""
    return [[length for _, length in row] for row in runs(segments)]


def numbered(lengths: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[b, s]` int64: segments of these lengths, numbered from 0 in each row."""
    return from_runs([list(enumerate(row)) for row in lengths])


def run_lengths(segments: torch.Tensor) -> tuple[int, ...]:
    """Of the runs of equal numbers in `[b, s]`, sample after sample; a run ends with its sample."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    ends = torch.cat([starts[1:], starts.new_tensor([segments.numel()])])
    return tuple((ends - starts).tolist())


def places(segments: torch.Tensor) -> torch.Tensor:
    """`[b, s]` int64: where each token stands in its run, from 0."""
    lengths = torch.tensor(run_lengths(segments), device=segments.device)
    begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return (torch.arange(segments.numel(), device=segments.device) - begins).view(segments.shape)


@dataclass(frozen=True)
class SegmentedMicrobatches:
    """The `runtime.microbatch_format.MicrobatchFormat` of a model of text whose samples have segments.

    Attributes:
        width: elements of a token between two stages.
    """

    width: int

    def told(self, batch: dict[str, Any]) -> Told:
        return {"segments": segment_lengths(batch["segments"])}

    def in_the_cloud(self, told: Told) -> dict[str, torch.Tensor]:
        # On the CPU: `segment_attention` asks for the lengths of the runs in every layer.
        return {"segments": numbered(segments_of(told))}

    def shape(self, told: Told, stage: int) -> tuple[int, ...]:
        segments = segments_of(told)
        return sum(segments[0]), len(segments), self.width
