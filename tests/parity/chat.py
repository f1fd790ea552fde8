"""Conversations for parity cases: packed into samples, padded on either side, or each alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from ldt_schedules.device import current_device
from ldt_schedules.training.chat.batching import ChatDataset
from ldt_schedules.training.chat.conversations import Conversations
from ldt_schedules.training.chat.packing import Pack, apart
from tests.parity.case import SEQUENCE, VOCABULARY

SAMPLES = ((5, 7), (3, 4, 5), (12,), (2, 9), (6, 5), (4, 4, 4), (10,), (2, 3, 4, 2))
"""Lengths of the conversations of each sample of a step; three samples have room left."""
MICROBATCHES, CONVERSATIONS = len(SAMPLES) // 2, sum(map(len, SAMPLES))


def conversations(step: int) -> Conversations:
    """Random ids; the first token is never learned, the last always."""
    random = np.random.RandomState(step)
    lengths = [length for sample in SAMPLES for length in sample]
    begins = np.cumsum([0, *lengths])
    learned = random.rand(begins[-1]) < 0.5
    learned[begins[:-1]], learned[begins[1:] - 1] = False, True
    return Conversations(random.randint(0, VOCABULARY, begins[-1]), learned, begins)


def _packs() -> list[Pack]:
    numbers = iter(range(CONVERSATIONS))
    return [tuple(next(numbers) for _ in sample) for sample in SAMPLES]


def _batches(
    step: int, microbatches: range, packs: Sequence[Pack], side: Literal["right", "left"], segmented: bool
) -> Iterator[dict[str, torch.Tensor]]:
    dataset = ChatDataset(conversations(step), {}, SEQUENCE, pad=0, padding_side=side, segmented=segmented)
    for microbatch in microbatches:
        # A case may have more microbatches than there are samples: they come again.
        two = [packs[(2 * microbatch + row) % len(packs)] for row in range(2)]
        yield {name: tensor.to(current_device()) for name, tensor in dataset.batch(two).items()}


def packed(step: int, microbatches: range) -> Iterator[dict[str, torch.Tensor]]:
    """Two samples of several conversations in a microbatch."""
    yield from _batches(step, microbatches, _packs(), "right", True)


def packed_left(step: int, microbatches: range) -> Iterator[dict[str, torch.Tensor]]:
    """With padding before them."""
    yield from _batches(step, microbatches, _packs(), "left", True)


def separate(step: int, microbatches: range) -> Iterator[dict[str, torch.Tensor]]:
    """The same conversations, each a sample; no segments, so that attention is Megatron's own."""
    yield from _batches(step, microbatches, apart([1] * CONVERSATIONS), "right", False)
