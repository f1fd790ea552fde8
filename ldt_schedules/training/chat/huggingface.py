"""A conversation to ids by a tokenizer of `transformers` and its own chat template.

The template gets plain strings, in which each image stands as `<|vision_start|><|image_pad|><|vision_end|>`, so that
templates for text alone work, too. Tokens that the tokenizer lacks are added behind its own; without a template it gets
the layout of `writing.py`.

What is learned is found on the rendered text, by rendering the conversation up to each of the assistant's messages:
from where its header ends to where its message ends, white space apart. Some templates write an answer otherwise once the
conversation goes on (Qwen3's puts an empty block of thoughts before the last answer, and none before those that other
questions follow). Then the text that is trained on is the whole conversation's, as the template writes it, and the answer
ends where the template's closing token does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.chat.samples import Image, Message
from ldt_schedules.training.chat.writing import (
    IMAGE,
    TURN_END,
    TURN_START,
    VIDEO,
    VISION_END,
    VISION_START,
    ChatError,
    VisionIds,
    Written,
)
from ldt_schedules.training.tokenizer import HuggingFaceTokenizer

_ANSWER = "(the answer)"
"""Stands for one, to see what a template puts behind it."""


@dataclass
class HuggingFaceChat:
    """A tokenizer of `transformers` and its chat template, if it has one.

    Raises:
        ConfigError: as `HuggingFaceTokenizer`; it is a slow one; a given id is none of its own.
    """

    name: str
    image: int | None = None
    video: int | None = None
    pictures: bool = True
    inner: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.inner = HuggingFaceTokenizer(self.name).inner
        if not self.inner.is_fast:
            raise ConfigError(
                f"data.tokenizer {self.name!r} is not a fast one, which says where in the text a token stands; give a "
                "directory with a tokenizer.json"
            )
        self._has_template = bool(getattr(self.inner, "chat_template", None))
        placeholders = self._placeholders() if self.pictures else []
        needed = placeholders + ([] if self._has_template else [TURN_START, TURN_END])
        known = self.inner.get_vocab()
        self.inner.add_tokens([token for token in needed if token not in known], special_tokens=True)
        self._vision = VisionIds(*self.inner.convert_tokens_to_ids(placeholders)) if self.pictures else None
        self._special = self._forbidden(placeholders)
        # Ids may have gaps, so their number does not bound them.
        self.vocab_size = 1 + max(self.inner.get_vocab().values())
        pad = self.inner.pad_token_id
        self.pad = int(self.inner.eos_token_id if pad is None else pad)

    @property
    def vision(self) -> VisionIds:
        assert self._vision is not None, "opened without pictures"
        return self._vision

    def _placeholders(self) -> list[str]:
        """In the order of `VisionIds`."""
        self._image = self._token("vision.image_token", self.image, IMAGE)
        self._video = self._token("vision.video_token", self.video, VIDEO)
        return [self._image, self._video, VISION_START, VISION_END]

    def _forbidden(self, placeholders: list[str]) -> frozenset[str]:
        """What no text may contain: the tokenizer would make it a token that ends a turn or stands for an image.

        Llama 3's `<|start_header_id|>` is special without a role, so `all_special_tokens` alone would lack it.
        """
        ours = {*placeholders, TURN_START, TURN_END} & set(self.inner.get_vocab())
        added = {str(token) for token in self.inner.added_tokens_decoder.values() if token.special}
        return frozenset((ours | added | set(self.inner.all_special_tokens)) - {""})

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

    def write(self, messages: Sequence[Message], tokens: Sequence[int] = ()) -> Written:
        plain = [{"role": message.role, "content": self._content(message)} for message in messages]
        text = self._render(plain)
        made = self.inner(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(made["input_ids"], dtype=np.int64)
        starts, ends = np.asarray(made["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        learned = np.zeros(len(ids), dtype=bool)
        for begin, end in self._spans(plain, text):
            # A token may be longer than its part of the span: "\\n" of the header may be one with the answer's first.
            learned |= (starts >= begin) & (starts < end) & (ends > begin)
        if not self.pictures:
            return Written(ids, learned)
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
            if text.startswith(before) and until.startswith(before) and text.startswith(until):
                yield len(before), max(len(before), len(until.rstrip()))
                continue
            closing = self._closing(messages[:index])
            end = text.find(closing, len(before))
            if not (text.startswith(before) and closing) or end < 0 or closing in message["content"]:
                raise ChatError(
                    f"the chat template of data.tokenizer {self.name!r} writes a conversation otherwise when it goes "
                    f"on, so that message {index} cannot be found in it; give a template that only appends"
                )
            yield len(before), end + len(closing)

    def _closing(self, before: list[dict[str, str]]) -> str:
        """What the template puts behind an answer to `before`, white space apart; nothing: it cannot be told."""
        return self._render([*before, {"role": "assistant", "content": _ANSWER}]).rpartition(_ANSWER)[2].strip()

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
