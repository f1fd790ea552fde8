"""What a run is trained on, at the edge: text, conversations, or conversations with images. The loop sees no difference.

data = open_data(config)            ids, sizes, what is wrong with the files
data.microbatches("train", 0)       endless microbatches of one replica, on the CPU
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ldt_schedules.errors import LdtError
from ldt_schedules.topology import Site
from ldt_schedules.training.chat.batching import ChatDataset, open_chat_dataset
from ldt_schedules.training.chat.batching import batches as chat_batches
from ldt_schedules.training.chat.writing import Chat, open_chat
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.data import Split, TokenDataset, batches, open_dataset
from ldt_schedules.training.data_format import holds_messages
from ldt_schedules.training.huggingface_model import vocab_rows
from ldt_schedules.training.image_text import batching
from ldt_schedules.training.image_text.pixels import Pixels
from ldt_schedules.training.image_text.preparing import Preparing
from ldt_schedules.training.parameters import padded_vocab_size
from ldt_schedules.training.tokenizer import open_tokenizer
from ldt_schedules.training.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

CHARTS_DIR = "charts"


class RunData(Protocol):
    """`vocab_size` counts the ids that can occur."""

    @property
    def vocab_size(self) -> int: ...

    def vocabulary(self, slices: int) -> Vocabulary:
        """For a model whose embedding is cut over `slices` processes."""

    @property
    def announced(self) -> bool:
        """Must the middle layers be told more of a microbatch than its shape (`runtime/microbatch_format.py`)?"""

    @property
    def contents(self) -> str:
        """What was found, for the first screen; nothing where the config says it all."""

    def unigram_entropy(self) -> float | None:
        """Nats a token, see `data.Corpus`; None where that says nothing."""

    def microbatches(
        self, split: Split, data_rank: int, *, consumed_samples: int = 0
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Endless microbatches of one replica, on the CPU.

        Args:
            consumed_samples: samples of all replicas that were seen before; what comes then is what would have come.
        """

    def tokens_of(self, batch: dict[str, torch.Tensor]) -> int:
        """Tokens of a microbatch, padding left out."""


def open_data(config: TrainConfig, site: Site = Site.EDGE) -> RunData:
    """The edge only.

    Raises:
        ConfigError: data or tokenizer cannot be used, or there is too little of it.
        LdtError: a process of the cloud asked, whether or not it could read them.
    """
    if site is not Site.EDGE:
        raise LdtError(f"a process of the {site} opens no data: they stay at the edge")
    if not config.has_vision:
        if not holds_messages(config):
            return TextData(config, open_dataset(config))
        chat = open_chat(config.data.tokenizer, pictures=False)
        return ChatData(config, open_chat_dataset(config, chat), chat)
    preparing = Preparing(open_image_chat(config), pixels_of(config), config.model.seq_length)
    dataset = batching.open_image_text(
        config.data.path,
        preparing,
        charts_folder=Path(config.train.output_dir) / CHARTS_DIR,
        validation_fraction=config.data.validation_fraction,
        on_bad_sample=config.data.on_bad_sample,
    )
    return ImageTextData(config, dataset, preparing.chat)


def prepare_images(config: TrainConfig) -> None:
    """Before any process starts: draw the charts if these are the data, and find mistakes in the user's file.

    Raises:
        ConfigError: see `samples.read_samples`; a package is missing; a tokenizer cannot be loaded.
    """
    open_data(config)


def vocab_size_of(config: TrainConfig) -> int:
    """Ids that the run's tokenizer may give. Raises ConfigError: it cannot be loaded."""
    if config.has_vision:
        return max(open_image_chat(config).vocab_size, vocab_rows(config))
    if holds_messages(config):
        return max(open_chat(config.data.tokenizer, pictures=False).vocab_size, vocab_rows(config))
    return max(open_tokenizer(config.data.tokenizer).vocab_size, vocab_rows(config))


def open_image_chat(config: TrainConfig) -> Chat:
    """The tokenizer with its ids for images. Raises ConfigError as `open_chat` does."""
    vision = config.vision
    return open_chat(config.data.tokenizer, image_token=vision.image_token, video_token=vision.video_token)


def pixels_of(config: TrainConfig) -> Pixels:
    """How pictures become patches in this run."""
    vision = config.vision
    return Pixels(
        patch=vision.patch_size,
        temporal_patch=vision.temporal_patch_size,
        merge=vision.merge_size,
        min_pixels=vision.min_pixels,
        max_pixels=vision.max_pixels,
    )


@dataclass(frozen=True)
class TextData:
    """Text, cut into samples without padding."""

    config: TrainConfig
    dataset: TokenDataset

    @property
    def vocab_size(self) -> int:
        return max(self.dataset.corpus.vocab_size, vocab_rows(self.config))

    def vocabulary(self, slices: int) -> Vocabulary:
        return Vocabulary(padded_vocab_size(self.vocab_size, slices, self.config.model.hf is not None))

    announced = False
    contents = ""

    def unigram_entropy(self) -> float | None:
        return self.dataset.corpus.unigram_entropy()

    def microbatches(
        self, split: Split, data_rank: int, *, consumed_samples: int = 0
    ) -> Iterator[dict[str, torch.Tensor]]:
        return batches(self.dataset, self.config, split=split, consumed_samples=consumed_samples, data_rank=data_rank)

    def tokens_of(self, batch: dict[str, torch.Tensor]) -> int:
        return batch["tokens"].numel()


@dataclass(frozen=True)
class ChatData:
    """Conversations of text, several in a sample or one."""

    config: TrainConfig
    dataset: ChatDataset
    chat: Chat

    @property
    def vocab_size(self) -> int:
        return max(self.chat.vocab_size, vocab_rows(self.config))

    def vocabulary(self, slices: int) -> Vocabulary:
        return Vocabulary(padded_vocab_size(self.vocab_size, slices, self.config.model.hf is not None))

    @property
    def announced(self) -> bool:
        return self.dataset.segmented

    @property
    def contents(self) -> str:
        samples = sum(map(len, self.dataset.packs.values()))
        return (
            f"{len(self.dataset.conversations):,} conversations in {samples:,} samples, {self.dataset.real_share():.1%} of "
            "whose tokens are no padding"
        )

    def unigram_entropy(self) -> float | None:
        return self.dataset.learned_entropy()

    def microbatches(
        self, split: Split, data_rank: int, *, consumed_samples: int = 0
    ) -> Iterator[dict[str, torch.Tensor]]:
        return chat_batches(
            self.dataset, self.config, split=split, consumed_samples=consumed_samples, data_rank=data_rank
        )

    def tokens_of(self, batch: dict[str, torch.Tensor]) -> int:
        return int(batch["lengths"].sum())


@dataclass(frozen=True)
class ImageTextData:
    """Conversations with images and videos."""

    config: TrainConfig
    dataset: batching.ImageTextDataset
    chat: Chat

    @property
    def vocab_size(self) -> int:
        return max(self.chat.vocab_size, vocab_rows(self.config))

    def vocabulary(self, slices: int) -> Vocabulary:
        vision = self.chat.vision
        return Vocabulary(
            padded_vocab_size(self.vocab_size, slices, self.config.model.hf is not None), vision.image, vision.video
        )

    announced = True
    contents = ""

    def unigram_entropy(self) -> float | None:
        return None  # most tokens are placeholders of images

    def microbatches(
        self, split: Split, data_rank: int, *, consumed_samples: int = 0
    ) -> Iterator[dict[str, torch.Tensor]]:
        train = self.config.train
        dealing = batching.Dealing(
            micro_batch_size=train.micro_batch_size,
            data_parallel=self.config.data_parallel,
            num_microbatches=self.config.num_microbatches,
            encoder_dp_balance=train.encoder_dp_balance,
        )
        return batching.batches(
            self.dataset,
            dealing,
            self._positions,
            seed=train.seed,
            split=split,
            consumed_samples=consumed_samples,
            data_rank=data_rank,
            padding_side=self.config.data.padding_side,
        )

    def tokens_of(self, batch: dict[str, torch.Tensor]) -> int:
        return int(batching.token_counts(batch, self.chat.vision).real.sum())

    def _positions(
        self, input_ids: torch.Tensor, grids: torch.Tensor, segments: torch.Tensor, seconds_per_video: list[float]
    ) -> torch.Tensor:
        from ldt_schedules.megatron.vision_language.mrope import mrope_positions

        return mrope_positions(
            input_ids,
            grids,
            segments,
            batching.is_padding(segments),
            image_token=self.chat.vision.image,
            video_token=self.chat.vision.video,
            merge_size=self.config.vision.merge_size,
            tokens_per_second=self.config.vision.tokens_per_second,
            seconds_per_grid=seconds_per_video,
        )
