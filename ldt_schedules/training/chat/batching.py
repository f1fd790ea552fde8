"""Samples of one conversation or several, and microbatches of them.

    packed        1 1 1 1 1 2 2 2 3 3 3 3 3 3 0 0       segments; the last is padding, or the first with padding_side left
    one a sample  1 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0
    labels        . a a a _ . a _ . . . a a _ _ _       the next token, where the assistant wrote it; none across a border

Which sample comes at position n is a function of (seed, n) alone, as in `training/data.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.chat.conversations import Conversations, open_conversations
from ldt_schedules.training.chat.packing import Pack, apart, packed
from ldt_schedules.training.chat.writing import Chat
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.data import Split, dealt, unigram_entropy, validation_share
from ldt_schedules.training.data_format import has_segments
from ldt_schedules.training.sections import set_among

if TYPE_CHECKING:
    import torch

_OTHER_ATTENTIONS = ("window_size", "softmax_type", "multi_latent_attention")
"""Fields of megatron-core's TransformerConfig."""
_PADDING = 0
"""The segment of padding; conversations are 1, 2, ..."""


@dataclass(frozen=True)
class ChatDataset:
    """Conversations, and which of them share a sample.

    Attributes:
        packs: of each split; no conversation is in both.
        pad: id that fills up a sample.
        segmented: batches say where each conversation begins, because the causal mask alone would let others be seen.
    """

    conversations: Conversations
    packs: Mapping[Split, tuple[Pack, ...]]
    seq_length: int
    pad: int
    padding_side: Literal["right", "left"]
    segmented: bool

    def num_samples(self, split: Split) -> int:
        return len(self.packs[split])

    def real_share(self) -> float:
        """Of all tokens in samples those that are no padding."""
        samples = sum(map(len, self.packs.values()))
        return float(self.conversations.begins[-1]) / (samples * self.seq_length)

    def learned_entropy(self) -> float:
        """Nats a token of what the assistant wrote, see `data.Corpus.unigram_entropy`."""
        return unigram_entropy(self.conversations.ids[self.conversations.learned])

    def batch(self, packs: Sequence[Pack]) -> dict[str, torch.Tensor]:
        """A microbatch of these samples.

        Returns:
            `tokens`, `labels`, `position_ids` (int64; they begin again in each conversation) and `loss_mask` (float32, 1
            where the label is the assistant's), each `[b, s]`; `lengths`, `[b]` int64, the tokens that are no padding;
            where it is `segmented`, `segments`, `[b, s]` int64.
        """
        import torch

        from ldt_schedules.megatron.segments import places

        shape = len(packs), self.seq_length
        tokens, labels = (np.full(shape, self.pad, dtype=np.int64) for _ in range(2))
        mask, segments = np.zeros(shape, dtype=np.float32), np.full(shape, _PADDING, dtype=np.int64)
        lengths = [sum(len(self.conversations[number].ids) for number in pack) for pack in packs]
        for row, pack in enumerate(packs):
            start = 0 if self.padding_side == "right" else self.seq_length - lengths[row]
            for segment, number in enumerate(pack, 1):
                one = self.conversations[number]
                end = start + len(one.ids)
                tokens[row, start:end], segments[row, start:end] = one.ids, segment
                # The last token has no successor, least of all the next conversation's first.
                labels[row, start : end - 1], mask[row, start : end - 1] = one.ids[1:], one.learned[1:]
                start = end
        numbered = torch.from_numpy(segments)
        batch = {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": places(numbered),
            "lengths": torch.tensor(lengths, dtype=torch.int64),
        }
        return {**batch, "segments": numbered} if self.segmented else batch


def open_chat_dataset(config: TrainConfig, chat: Chat) -> ChatDataset:
    """Read, check, write and pack. The edge only.

    Raises:
        ConfigError: as `open_conversations`; too few conversations; an attention that knows no segments.
    """
    segmented = has_segments(config)
    if segmented:
        _check_attention(config)
    conversations = open_conversations(config, chat)
    fraction = config.data.validation_fraction
    kept = validation_share(len(conversations), fraction)
    first = len(conversations) - kept
    if first < 1:
        raise ConfigError(
            f"data.path {config.data.path} has {len(conversations)} conversation, of which data.validation_fraction "
            f"{fraction} keeps {kept} for evaluation; give more, or set data.validation_fraction=0"
        )
    room, lengths = config.model.seq_length, conversations.lengths

    def packs(part: list[int]) -> tuple[Pack, ...]:
        return packed(part, room) if config.data.packing else apart(part)

    validation = tuple(tuple(number + first for number in pack) for pack in packs(lengths[first:]))
    return ChatDataset(
        conversations=conversations,
        packs={"train": packs(lengths[:first]), "validation": validation},
        seq_length=room,
        pad=chat.pad,
        padding_side=config.data.padding_side,
        segmented=segmented,
    )


def _check_attention(config: TrainConfig) -> None:
    """`megatron/segment_attention.py` stands in for Megatron's attention, and would pass over what these ask for."""
    for name in set_among(_OTHER_ATTENTIONS, config.model.megatron):
        raise ConfigError(
            f"model.megatron.{name} asks for an attention that cannot be kept inside each conversation of a sample; leave it "
            "out, or set data.packing=false (and data.padding_side=right)"
        )


def batches(
    dataset: ChatDataset, config: TrainConfig, *, split: Split = "train", consumed_samples: int = 0, data_rank: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless microbatches of one data-parallel replica, on the CPU; arguments and errors as of `data.batches`."""
    for order in dealt(
        dataset.num_samples(split), config, split=split, consumed_samples=consumed_samples, data_rank=data_rank
    ):
        yield dataset.batch([dataset.packs[split][index] for index in order])
