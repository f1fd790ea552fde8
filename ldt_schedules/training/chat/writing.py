"""A conversation to token ids, with those that the assistant wrote marked.

    <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>Which bar ...?<|im_end|>\\n
                                      t * h * w / merge^2 of them
    <|im_start|>assistant\\nMarch<|im_end|>\\n
                           ~~~~~~~~~~~~~~~ learned

Two kinds of tokenizer. `bytes` has no special tokens, so ours get ids behind its own, and the layout above is ours. A
Hugging Face tokenizer writes the conversation with its own chat template (`huggingface.py`). Tokens for images are there
only where images may be: a tokenizer of a model of text stays as large as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.chat.samples import Image, Message, Video
from ldt_schedules.training.tokenizer import ByteTokenizer

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


class ChatError(Exception):
    """A conversation cannot be written. Says why, without the sample's name, which the caller knows."""


@dataclass(frozen=True)
class VisionIds:
    """Ids of the placeholders, and of what stands around them."""

    image: int
    video: int
    start: int
    end: int


@dataclass(frozen=True)
class Written:
    """A conversation as ids.

    Attributes:
        ids: `[n]` int64.
        learned: `[n]` bool, the tokens that the assistant wrote, its end of turn included.
    """

    ids: np.ndarray
    learned: np.ndarray


class Chat(Protocol):
    """`vocab_size` counts every id that `write` can give; `pad` fills up a batch."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad(self) -> int: ...

    @property
    def vision(self) -> VisionIds:
        """Only of one that is opened with pictures."""
        ...

    def write(self, messages: Sequence[Message], tokens: Sequence[int] = ()) -> Written:
        """The conversation's ids.

        Args:
            tokens: how many placeholders each image and video takes, in the order of the text.

        Raises:
            ChatError: the template refuses it or cannot be followed, or a text contains a special token.
        """
        ...


@dataclass(frozen=True)
class ByteChat:
    """Bytes, and the special tokens behind them: 257 and so on, those given apart."""

    placeholders: VisionIds | None
    turn_start: int
    turn_end: int
    vocab_size: int
    pad: int = ByteTokenizer.eod

    @property
    def vision(self) -> VisionIds:
        assert self.placeholders is not None, "opened without pictures"
        return self.placeholders

    @classmethod
    def of_text(cls) -> ByteChat:
        own = ByteTokenizer.vocab_size
        return cls(None, turn_start=own, turn_end=own + 1, vocab_size=own + 2)

    @classmethod
    def with_ids(cls, image: int | None, video: int | None) -> ByteChat:
        own = ByteTokenizer.vocab_size
        given = [value for value in (image, video) if value is not None]
        if len(set(given)) < len(given) or any(value < own for value in given):
            raise ConfigError(
                f"vision.image_token {image} and vision.video_token {video}: with data.tokenizer=bytes two different "
                f"ids from {own} on are needed (or null)"
            )
        free = (value for value in itertools.count(own) if value not in given)
        image = next(free) if image is None else image
        video = next(free) if video is None else video
        start, end, turn_start, turn_end = itertools.islice(free, 4)
        highest = max(image, video, start, end, turn_start, turn_end)
        return cls(VisionIds(image, video, start, end), turn_start, turn_end, vocab_size=highest + 1)

    def write(self, messages: Sequence[Message], tokens: Sequence[int] = ()) -> Written:
        counts = iter(tokens)
        pieces: list[tuple[list[int], bool]] = []
        for message in messages:
            pieces.append(([self.turn_start, *f"{message.role}\n".encode()], False))
            learned = message.role == "assistant"
            pieces += [(self._part(part, counts), learned) for part in message.parts]
            pieces += [([self.turn_end], learned), ([*b"\n"], False)]
        ids = np.array([value for piece, _ in pieces for value in piece], dtype=np.int64)
        return Written(ids, np.repeat([learned for _, learned in pieces], [len(piece) for piece, _ in pieces]))

    def _part(self, part: str | Image | Video, counts: Iterator[int]) -> list[int]:
        if isinstance(part, str):
            return list(part.encode())
        one = self.vision.image if isinstance(part, Image) else self.vision.video
        return [self.vision.start, *[one] * next(counts), self.vision.end]


def open_chat(
    tokenizer: str, *, pictures: bool = True, image_token: int | None = None, video_token: int | None = None
) -> Chat:
    """What `data.tokenizer` names.

    Args:
        pictures: messages may have images and videos, which need ids of their own.
        image_token, video_token: ids of the placeholders; None: the tokenizer's `<|image_pad|>` and `<|video_pad|>`, or
            the next free ids behind its own.

    Raises:
        ConfigError: it cannot be loaded, or an id cannot be used.
    """
    if tokenizer == "bytes":
        return ByteChat.with_ids(image_token, video_token) if pictures else ByteChat.of_text()
    from ldt_schedules.training.chat.huggingface import HuggingFaceChat

    return HuggingFaceChat(tokenizer, image_token, video_token, pictures)
