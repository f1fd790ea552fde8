"""All conversations of a run as ids, one behind the other; what is too long is cut, what teaches nothing is left out.

    ids      c o n v e r s a t i o n 0 c o n v 1 c o n v e r s a t i o n 2
    learned  . . . . . . . x x x x x . . . x x . . . . . . . . x x x x x x      what the assistant wrote
    begins   0                         14        21                            and the end

They are written once, at the start: how they are packed depends on all lengths. What was cut or left out is counted and
told once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.chat.samples import Sample, read_samples
from ldt_schedules.training.chat.standard_library import library_conversations
from ldt_schedules.training.chat.writing import Chat, ChatError, Written
from ldt_schedules.training.config import TrainConfig


@dataclass(frozen=True)
class Conversations:
    """`ids` and `learned` are `[n]`, `begins` is `[conversations + 1]`: where each begins, and the end of the last."""

    ids: np.ndarray
    learned: np.ndarray
    begins: np.ndarray

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, number: int) -> Written:
        span = slice(self.begins[number], self.begins[number + 1])
        return Written(self.ids[span].astype(np.int64), self.learned[span])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        lengths: list[int] = np.diff(self.begins).tolist()
        return lengths


def open_conversations(config: TrainConfig, chat: Chat) -> Conversations:
    """Read, check and write them all.

    Raises:
        ConfigError: no file; with `data.on_bad_sample: stop` a line that cannot be used; none that can.
    """
    bad: list[ConfigError] = []
    passed_over = bad.append if config.data.on_bad_sample == "skip" else None
    path = config.data.path
    samples = library_conversations() if path is None else read_samples(path, pictures=False, bad=passed_over)
    total, tally = len(samples) + len(bad), _Tally()
    written = list(_cut(_written(samples, chat, passed_over), config.model.seq_length, tally))
    _tell(tally, bad, total, config.model.seq_length)
    if not written:
        raise ConfigError(
            f"data.path {path}: of {total} conversations none can be learned from; "
            + (f"the first: {bad[0]}" if bad else f"raise model.seq_length, now {config.model.seq_length}")
        )
    lengths = [len(one.ids) for one in written]
    return Conversations(
        ids=np.concatenate([one.ids for one in written]).astype(np.min_scalar_type(chat.vocab_size - 1)),
        learned=np.concatenate([one.learned for one in written]),
        begins=np.cumsum([0, *lengths]),
    )


@dataclass
class _Tally:
    """Conversations that were cut, and those of which nothing was left to learn."""

    cut: int = 0
    dropped: int = 0


def _written(samples: Sequence[Sample], chat: Chat, bad: Callable[[ConfigError], None] | None) -> Iterator[Written]:
    for sample in samples:
        try:
            yield _one(sample, chat)
        except ConfigError as error:
            if bad is None:
                raise
            bad(error)


def _one(sample: Sample, chat: Chat) -> Written:
    """Raises ConfigError: the chat template refuses it, or there is nothing to learn."""
    try:
        written = chat.write(sample.messages)
    except ChatError as error:
        raise ConfigError(f"data.path {sample.name}: {error}") from None
    if not written.learned[1:].any():
        raise ConfigError(f"data.path {sample.name}: the assistant's messages are empty; at least a token is needed")
    return written


def _cut(conversations: Iterator[Written], seq_length: int, tally: _Tally) -> Iterator[Written]:
    """Those of which something can be learned, at most `seq_length` tokens of each. The first token is nobody's label."""
    for one in conversations:
        if len(one.ids) > seq_length:
            tally.cut += 1
            one = Written(one.ids[:seq_length], one.learned[:seq_length])
        if one.learned[1:].any():
            yield one
        else:
            tally.dropped += 1


def _tell(tally: _Tally, bad: Sequence[ConfigError], total: int, seq_length: int) -> None:
    if bad:
        warnings.warn(
            f"{len(bad)} of {total} conversations cannot be used and are passed over; the first: {bad[0]}", stacklevel=2
        )
    if tally.cut:
        lost = f", {tally.dropped} of them before the assistant's first word, and left out" if tally.dropped else ""
        warnings.warn(
            f"{tally.cut} of {total} conversations have more than model.seq_length {seq_length} tokens and are cut at their "
            f"end{lost}",
            stacklevel=2,
        )
