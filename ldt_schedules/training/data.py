"""Tokenized text, cut into samples, dealt out as microbatches. Only the edge ever calls `open_dataset`.

    corpus   d o c u m e n t 1 <eod> d o c u m e n t 2 <eod> ...        one stream of ids
    samples  |---- 0 ----|---- 1 ----|---- 2 ----| ... | validation |   seq_length tokens each, + 1 as last label
    order    a permutation of the samples for each epoch, from (seed, epoch)
    deal     global sample n, n + 1, ...: microbatches in order, each cut over the data-parallel replicas

Which sample comes at position n is a function of (seed, n) alone. A run is resumed by the number of samples it has
consumed, and two layouts of the same run see the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.chat.samples import read_samples
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.corpus import check_readable, check_text_file, documents, is_jsonl
from ldt_schedules.training.data_format import holds_messages
from ldt_schedules.training.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer

if TYPE_CHECKING:
    import torch

Split = Literal["train", "validation"]

_LOOK_BYTES = 1 << 20


def unigram_entropy(tokens: np.ndarray) -> float:
    """Nats a token of `[n]` ids, each foretold by how frequent it is among them."""
    counts = np.bincount(tokens).astype(np.float64)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@dataclass(frozen=True)
class Corpus:
    """All tokens of the data, in order. `tokens` is `[n]`, of the smallest unsigned type that holds the ids."""

    tokens: np.ndarray
    vocab_size: int
    eod: int

    def unigram_entropy(self) -> float:
        """Nats a token of a model that knows how frequent each token is, and nothing else.

        A loss below it shows that context is being used.
        """
        return unigram_entropy(self.tokens)


@dataclass(frozen=True)
class TokenDataset:
    """Samples of `seq_length` tokens: the first `num_train` for training, the last `num_validation` for evaluation."""

    corpus: Corpus
    seq_length: int
    num_train: int
    num_validation: int

    def num_samples(self, split: Split) -> int:
        return self.num_train if split == "train" else self.num_validation

    def sample(self, split: Split, index: int) -> np.ndarray:
        """`[seq_length + 1]` ids, int64: tokens are all but the last, labels all but the first."""
        assert 0 <= index < self.num_samples(split), f"no {split} sample {index}"
        start = (index if split == "train" else self.num_train + index) * self.seq_length
        return self.corpus.tokens[start : start + self.seq_length + 1].astype(np.int64)


def open_dataset(config: TrainConfig) -> TokenDataset:
    """Read and tokenize the data. The edge only.

    Raises:
        ConfigError: data or tokenizer cannot be used, or there is too little of it.
    """
    corpus = read_corpus(config.data.path, open_tokenizer(config.data.tokenizer))
    name = "the default corpus" if config.data.path is None else f"data.path {config.data.path}"
    return cut(corpus, config.model.seq_length, config.data.validation_fraction, name=name)


def check_data(config: TrainConfig) -> None:
    """Find the usual mistakes about `data.path` in a moment, without reading all of it; of conversations every line.

    Raises:
        ConfigError: missing, unreadable, empty, or a beginning that is no text; a line that is no conversation.
    """
    if holds_messages(config):
        if config.data.path is not None and config.data.on_bad_sample == "stop":
            read_samples(config.data.path, pictures=False)
    elif config.data.path is not None:
        file = Path(config.data.path)
        check_readable(file)
        if is_jsonl(file):
            next(documents(config.data.path), None)
        else:
            check_text_file(file, max_bytes=_LOOK_BYTES)


def read_corpus(path: str | None, tokenizer: Tokenizer) -> Corpus:
    """Tokenize every document and put `eod` after each. A text file taken as bytes is mapped, not read.

    Raises:
        ConfigError: as `corpus.documents`.
    """
    if path is not None and isinstance(tokenizer, ByteTokenizer) and not is_jsonl(Path(path)):
        check_text_file(Path(path))
        return Corpus(np.memmap(path, dtype=np.uint8, mode="r"), tokenizer.vocab_size, tokenizer.eod)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    end = np.array([tokenizer.eod], dtype=dtype)
    pieces: list[np.ndarray] = []
    for text in documents(path):
        pieces += [tokenizer.encode(text).astype(dtype), end]
    if not pieces:
        raise ConfigError(f"data.path {path} holds no document; give a file with text")
    return Corpus(np.concatenate(pieces), tokenizer.vocab_size, tokenizer.eod)


def cut(corpus: Corpus, seq_length: int, validation_fraction: float, *, name: str = "the corpus") -> TokenDataset:
    """Divide a corpus into samples, the last part for validation.

    Raises:
        ConfigError: not enough tokens for one training sample (and one for validation, where a share is asked for).
    """
    samples = (len(corpus.tokens) - 1) // seq_length
    validation = validation_share(samples, validation_fraction)
    if samples - validation < 1:
        needed = (1 + (validation_fraction > 0)) * seq_length + 1
        parts = "one sample to train on and one to validate on" if validation else "one sample"
        raise ConfigError(
            f"{name} has {len(corpus.tokens)} tokens, but {parts} of model.seq_length {seq_length} take {needed}; "
            f"give more text or lower model.seq_length"
        )
    return TokenDataset(corpus, seq_length, samples - validation, validation)


def validation_share(samples: int, fraction: float) -> int:
    """How many samples, of the last, are kept for evaluation: at least one where any share is."""
    return max(1, round(samples * fraction)) if fraction > 0 else 0


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    # RandomState, because numpy promises that its streams never change: a run resumes the same after an upgrade.
    return np.random.RandomState([seed, epoch]).permutation(num_samples)


def sample_index(position: int, num_samples: int, seed: int) -> int:
    """Which sample comes at `position` (0, 1, 2, ... over all epochs)."""
    epoch, place = divmod(position, num_samples)
    return int(_permutation(seed, epoch, num_samples)[place])


def batches(
    dataset: TokenDataset,
    config: TrainConfig,
    *,
    split: Split = "train",
    consumed_samples: int = 0,
    data_rank: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless microbatches of one data-parallel replica.

    Args:
        consumed_samples, data_rank: as of `dealt`.

    Yields:
        `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each `[b, s]`, on the CPU.

    Raises:
        ConfigError: the split has no sample.
    """
    for order in dealt(
        dataset.num_samples(split), config, split=split, consumed_samples=consumed_samples, data_rank=data_rank
    ):
        yield _as_batch(np.stack([dataset.sample(split, index) for index in order]))


def dealt(
    num_samples: int, config: TrainConfig, *, split: Split, consumed_samples: int, data_rank: int
) -> Iterator[list[int]]:
    """The samples of each microbatch of one data-parallel replica, endless.

    Args:
        consumed_samples: global samples that were seen before, over all replicas; a step consumes
            `train.global_batch_size`. Give 0 for each evaluation, and it sees the same samples every time.
        data_rank: number of the replica among `config.data_parallel`.

    Raises:
        ConfigError: the split has no sample.
    """
    if not num_samples:
        raise ConfigError(f"there is no {split} data; set data.validation_fraction above 0 or train.eval_interval=0")
    per_replica = config.train.micro_batch_size
    position = consumed_samples + data_rank * per_replica
    while True:
        yield [sample_index(position + i, num_samples, config.train.seed) for i in range(per_replica)]
        position += per_replica * config.data_parallel


def _as_batch(samples: np.ndarray) -> dict[str, torch.Tensor]:
    """`samples` is `[b, s + 1]`."""
    import torch

    ids = torch.from_numpy(samples)
    size, length = ids.shape[0], ids.shape[1] - 1
    return {
        "tokens": ids[:, :-1].contiguous(),
        "labels": ids[:, 1:].contiguous(),
        "loss_mask": torch.ones(size, length, dtype=torch.float32),
        "position_ids": torch.arange(length).expand(size, length).contiguous(),
    }
