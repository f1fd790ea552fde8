"""Conversations as padded microbatches, dealt over the data-parallel replicas. The edge only.

    segments, padded right     1 1 1 1 1 1 1 2 2 2        the conversation is 1 everywhere,
    segments, padded left      0 0 0 1 1 1 1 1 1 1        padding 0 before it or 2 behind

Which sample comes at position n is a function of (seed, n) alone, as in `training/data.py`: a run is resumed by the
number of samples it has consumed, and every layout sees the same global batches. Where the sample at a position is bad
and is to be skipped, the first good one of the positions behind it takes its place, and those positions keep theirs.
So one bad sample changes no other position, and replicas need not tell each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.chat.samples import Sample, read_samples
from ldt_schedules.training.chat.writing import VisionIds
from ldt_schedules.training.data import Split, sample_index, validation_share
from ldt_schedules.training.image_text.charts import default_charts
from ldt_schedules.training.image_text.dealing import encoder_dp_balance, given_order
from ldt_schedules.training.image_text.preparing import BadSample, Prepared, Preparing

if TYPE_CHECKING:
    import torch

    Positions = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[float]], torch.Tensor]

PaddingSide = Literal["right", "left"]
OnBadSample = Literal["stop", "skip"]
CONVERSATION = 1
"""The segment that is no padding."""

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class ImageTextDataset:
    """Samples and how to prepare them: the last `num_validation` are kept for evaluation.

    Attributes:
        skipped: what is wrong with each bad sample that was passed over so far, by its place in `samples`. It grows while
            batches are drawn; for the log.
    """

    samples: tuple[Sample, ...]
    num_validation: int
    preparing: Preparing
    on_bad_sample: OnBadSample = "stop"
    skipped: dict[int, str] = field(default_factory=dict, compare=False)

    def num_samples(self, split: Split) -> int:
        return self.num_validation if split == "validation" else len(self.samples) - self.num_validation

    def at(self, split: Split, position: int, seed: int, make: Callable[[Sample], _Made]) -> _Made:
        """What `make` makes of the sample at `position` (0, 1, 2, ... over all epochs), or of its substitute.

        Raises:
            BadSample: it is bad and `on_bad_sample` is stop.
            ConfigError: as many samples in a row as the split has are bad.
        """
        count = self.num_samples(split)
        first = 0 if split == "train" else len(self.samples) - count
        for tried in range(position, position + count):
            index = first + sample_index(tried, count, seed)
            try:
                # Also where it is known to be bad: replicas that measure must see what those see that decode nothing.
                return make(self.samples[index])
            except BadSample as error:
                if self.on_bad_sample == "stop":
                    raise
                if index not in self.skipped:
                    self.skipped[index] = str(error)
                    warnings.warn(f"sample skipped ({len(self.skipped)} so far): {error}", stacklevel=2)
        reason = next(iter(self.skipped.values()))
        raise ConfigError(f"{count} {split} samples in a row cannot be used; the first that was found: {reason}")


def open_image_text(
    path: str | None,
    preparing: Preparing,
    *,
    charts_folder: str | Path,
    validation_fraction: float,
    on_bad_sample: OnBadSample = "stop",
) -> ImageTextDataset:
    """Read and check the data. The edge only.

    Args:
        path: the JSONL file of `samples`, or None: drawn charts.
        charts_folder: where those charts are, or are written to.

    Raises:
        ConfigError: no file, a line that is no sample, or too few samples; matplotlib is needed for charts.
    """
    samples = read_samples(default_charts(charts_folder) if path is None else path)
    validation = validation_share(len(samples), validation_fraction)
    if len(samples) - validation < 1:
        raise ConfigError(
            f"data.path {path} has {len(samples)} sample, of which data.validation_fraction {validation_fraction} keeps "
            f"{validation} for evaluation; give more samples, or set data.validation_fraction=0"
        )
    return ImageTextDataset(samples, validation, preparing, on_bad_sample)


@dataclass(frozen=True)
class Dealing:
    """Who gets what of a global batch.

    Attributes:
        micro_batch_size: samples of a microbatch, on one replica.
        num_microbatches: of a step, on one replica; a global batch is the product of the three.
        encoder_dp_balance: balance the image work over the replicas instead of dealing in order (`dealing`).
    """

    micro_batch_size: int
    data_parallel: int = 1
    num_microbatches: int = 1
    encoder_dp_balance: bool = False

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.data_parallel * self.num_microbatches


def batches(
    dataset: ImageTextDataset,
    dealing: Dealing,
    positions: Positions,
    *,
    seed: int,
    split: Split = "train",
    consumed_samples: int = 0,
    data_rank: int = 0,
    padding_side: PaddingSide = "right",
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless microbatches of one data-parallel replica.

    Args:
        positions: `(input_ids [b, s], grids [images, 3], segments [b, s], seconds_per_grid, one number a video) ->
            [3, b, s]`, int64: the M-RoPE positions, 0 where there is padding (segments other than `CONVERSATION`).
        consumed_samples: global samples that were seen before, over all replicas. Give 0 for each evaluation, and it sees
            the same samples every time.
        data_rank: number of the replica among `dealing.data_parallel`.

    Yields:
        What `collate` makes, on the CPU.

    Raises:
        ConfigError: the split has no sample; `BadSample`.
    """
    if not dataset.num_samples(split):
        raise ConfigError(f"there is no {split} data; set data.validation_fraction above 0 or train.eval_interval=0")

    def prepared(position: int) -> Prepared:
        return dataset.at(split, position, seed, dataset.preparing.prepare)

    preparing, size = dataset.preparing, dealing.global_batch_size
    in_order = given_order(size, dealing.data_parallel, dealing.num_microbatches)
    for start in range(consumed_samples, 2**63, size):
        deal = in_order
        if dealing.encoder_dp_balance:
            measures = (dataset.at(split, start + place, seed, preparing.measure) for place in range(size))
            loads = [measure.patches for measure in measures]
            deal = encoder_dp_balance(loads, dealing.data_parallel, dealing.num_microbatches)
        for microbatch in deal:
            samples = [prepared(start + place) for place in microbatch[data_rank]]
            yield collate(samples, preparing, positions, padding_side=padding_side)


def collate(
    samples: Sequence[Prepared], preparing: Preparing, positions: Positions, *, padding_side: PaddingSide = "right"
) -> dict[str, torch.Tensor]:
    """Pad samples to `[b, s]` with s = `preparing.seq_length`.

    Returns:
        `input_ids`, `labels` (shifted), `segments`: `[b, s]` int64. `loss_mask`: `[b, s]` float32, 1 where the label is the
        assistant's. `position_ids`: `[3, b, s]` int64. `pixel_values`: `[patches, C * T * P * P]` float32 and `grids`:
        `[images, 3]` int64, those of all samples in order.
    """
    import torch

    shape = len(samples), preparing.seq_length
    ids = np.full(shape, preparing.chat.pad, dtype=np.int64)
    labels, mask = ids.copy(), np.zeros(shape, dtype=np.float32)
    segments = np.full(shape, CONVERSATION + (1 if padding_side == "right" else -1), dtype=np.int64)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        start = 0 if padding_side == "right" else shape[1] - length
        ids[row, start : start + length] = sample.ids
        segments[row, start : start + length] = CONVERSATION
        # The last token has no successor: its label stays padding, and it is not learned.
        labels[row, start : start + length - 1] = sample.ids[1:]
        mask[row, start : start + length - 1] = sample.learned[1:]
    grids = torch.from_numpy(np.concatenate([sample.grids for sample in samples]))
    seconds = [value for sample in samples for value in sample.seconds_per_grid]
    batch = {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "loss_mask": torch.from_numpy(mask),
        "segments": torch.from_numpy(segments),
        "pixel_values": torch.from_numpy(np.concatenate([sample.pixel_values for sample in samples])),
        "grids": grids,
    }
    return {**batch, "position_ids": positions(batch["input_ids"], grids, batch["segments"], seconds)}


def is_padding(segments: torch.Tensor) -> torch.Tensor:
    """`[b, s]` bool, from the `segments` of a microbatch."""
    return segments != CONVERSATION


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of each sample of a microbatch, `[b]` int64: all but padding; those that stand for images and videos;
    those whose prediction is learned."""

    real: torch.Tensor
    image: torch.Tensor
    learned: torch.Tensor


def token_counts(batch: dict[str, torch.Tensor], vision: VisionIds) -> TokenCounts:
    """Count the tokens of a microbatch that `batches` made, for tokens per sample in the log."""
    ids = batch["input_ids"]
    return TokenCounts(
        real=(~is_padding(batch["segments"])).sum(dim=1),
        image=((ids == vision.image) | (ids == vision.video)).sum(dim=1),
        learned=(batch["loss_mask"] > 0).sum(dim=1),
    )
