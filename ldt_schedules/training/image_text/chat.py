"""A conversation to token ids, with those that the assistant wrote marked.

    <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>Which bar ...?<|im_end|>\\n
                                      t * h * w / merge^2 of them
    <|im_start|>assistant\\nMarch<|im_end|>\\n
                           ~~~~~~~~~~~~~~~ learned

Two kinds of tokenizer. `bytes` has no special tokens, so ours get ids behind its own, and the layout above is ours. A
Hugging Face tokenizer writes the conversation with its own chat template; it gets plain strings in which each image
stands as `<|vision_start|><|image_pad|><|vision_end|>`, so that templates for text alone work, too. Tokens that it
lacks are added behind its own; without a template it gets the layout above.

What is learned is found on the rendered text, by rendering the conversation up to each of the assistant's messages:
from where its header ends to where its message ends, white space apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.image_text.samples import Image, Message, Video
from ldt_schedules.training.tokenizer import ByteTokenizer, HuggingFaceTokenizer

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
    def vision(self) -> VisionIds: ...

    def write(self, messages: Sequence[Message], tokens: Sequence[int]) -> Written:
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

    vision: VisionIds
    turn_start: int
    turn_end: int
    vocab_size: int
    pad: int = ByteTokenizer.eod

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

    def write(self, messages: Sequence[Message], tokens: Sequence[int]) -> Written:
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


@dataclass
class HuggingFaceChat:
    """A tokenizer of `transformers` and its chat template, if it has one.

    Raises:
        ConfigError: as `HuggingFaceTokenizer`; it is a slow one; a given id is none of its own.
    """

    name: str
    image: int | None = None
    video: int | None = None
    inner: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.inner = HuggingFaceTokenizer(self.name).inner
        if not self.inner.is_fast:
            raise ConfigError(
                f"data.tokenizer {self.name!r} is not a fast one, which says where in the text a token stands; give a "
                "directory with a tokenizer.json"
            )
        self._image = self._token("vision.image_token", self.image, IMAGE)
        self._video = self._token("vision.video_token", self.video, VIDEO)
        self._has_template = bool(getattr(self.inner, "chat_template", None))
        needed = [self._image, self._video, VISION_START, VISION_END]
        needed += [] if self._has_template else [TURN_START, TURN_END]
        known = self.inner.get_vocab()
        self.inner.add_tokens([token for token in needed if token not in known], special_tokens=True)
        self.vision = VisionIds(*self.inner.convert_tokens_to_ids(needed[:4]))
        self._special = {*needed[:4], TURN_START, TURN_END} & set(self.inner.get_vocab())
        # Ids may have gaps, so their number does not bound them.
        self.vocab_size = 1 + max(self.inner.get_vocab().values())
        pad = self.inner.pad_token_id
        self.pad = int(self.inner.eos_token_id if pad is None else pad)

    def _token(self, key: str, given: int | None, usual: str) -> str:
        if given is None:
            return usual
        token = self.inner.convert_ids_to_tokens(given) if 0 <= given < len(self.inner) else None
        if token is None:
            raise ConfigError(
                f"{key} {given} is no id of data.tokenizer {self.name!r}, which has 0 to {len(self.inner) - 1}; give "
                f"the id of its {usual}, or null"
            )
        return str(token)

    def write(self, messages: Sequence[Message], tokens: Sequence[int]) -> Written:
        plain = [{"role": message.role, "content": self._content(message)} for message in messages]
        text = self._render(plain)
        made = self.inner(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(made["input_ids"], dtype=np.int64)
        starts, ends = np.asarray(made["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        learned = np.zeros(len(ids), dtype=bool)
        for begin, end in self._spans(plain, text):
            # A token may be longer than its part of the span: "\\n" of the header may be one with the answer's first.
            learned |= (starts >= begin) & (starts < end) & (ends > begin)
        copies = self._copies(ids, tokens)
        return Written(np.repeat(ids, copies), np.repeat(learned, copies))

    def _content(self, message: Message) -> str:
        pieces = []
        for part in message.parts:
            if isinstance(part, str):
                found = [token for token in self._special if token in part]
                if found:
                    raise ChatError(f"a text contains {sorted(found)[0]}, a special token; write it otherwise")
                pieces.append(part)
            else:
                pieces.append(VISION_START + (self._image if isinstance(part, Image) else self._video) + VISION_END)
        return "".join(pieces)

    def _render(self, messages: list[dict[str, str]], *, answer_begins: bool = False) -> str:
        if not self._has_template:
            header = f"{TURN_START}assistant\n" if answer_begins else ""
            return "".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages) + header
        try:
            text = self.inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_begins)
        except Exception as error:  # a template raises what its author wrote
            raise ChatError(f"the chat template of data.tokenizer {self.name!r} refuses it ({error})") from None
        return str(text)

    def _spans(self, messages: list[dict[str, str]], text: str) -> Iterator[tuple[int, int]]:
        """Where in `text` the assistant's messages stand: `[begin, end)` of each."""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], answer_begins=True)
            until = self._render(messages[: index + 1])
            if not (until.startswith(before) and text.startswith(until)):
                raise ChatError(
                    f"the chat template of data.tokenizer {self.name!r} writes a conversation otherwise when it goes "
                    f"on, so that message {index} cannot be found in it; give a template that only appends"
                )
            yield len(before), max(len(before), len(until.rstrip()))

    def _copies(self, ids: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """`[n]`: how often each id stands in the result: 1, or the number of placeholders."""
        copies = np.ones(len(ids), dtype=np.int64)
        places = np.flatnonzero((ids == self.vision.image) | (ids == self.vision.video))
        if len(places) != len(tokens):
            raise ChatError(
                f"the chat template of data.tokenizer {self.name!r} wrote {len(places)} images and videos of "
                f"{len(tokens)}; give one that leaves the messages' content as it is"
            )
        copies[places] = tokens
        return copies


def open_chat(tokenizer: str, *, image_token: int | None = None, video_token: int | None = None) -> Chat:
    """What `data.tokenizer` names, with ids for images and videos.

    Args:
        image_token, video_token: ids of the placeholders; None: the tokenizer's `<|image_pad|>` and `<|video_pad|>`, or
            the next free ids behind its own.

    Raises:
        ConfigError: it cannot be loaded, or an id cannot be used.
    """
    if tokenizer == "bytes":
        return ByteChat.with_ids(image_token, video_token)
    return HuggingFaceChat(tokenizer, image_token, video_token)
