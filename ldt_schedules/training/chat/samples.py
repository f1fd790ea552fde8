"""Conversations, as users write them: a JSONL file, one sample a line.

    {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "charts/3.png"},
                                     {"type": "text", "text": "Which bar is the tallest?"}]},
        {"role": "assistant", "content": "March"}]}

It is the form of the `transformers` chat templates. Content may be a plain string; a video is given by its frames,
`{"type": "video", "video": ["0.png", "1.png"], "fps": 2}`. Paths are relative to the file that names them. Other keys
beside `messages` (an id, a source) are the user's own. Everything but the pictures' pixels is checked when the file is
read, so that a mistake in line 40000 is told before the first step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.corpus import check_readable, is_jsonl

ROLES = ("system", "user", "assistant")
_CHANGE_THE_TEXT = ("tools", "documents", "chat_template_kwargs")
"""Keys of a line with which a chat template writes another text; passing over them would train on another prompt."""
_MAX_FPS = 1_000_000
DEFAULT_FPS = 2.0
"""Frames a second of a video that does not say; the rate at which Qwen2.5-VL samples videos."""


@dataclass(frozen=True)
class Image:
    path: Path


@dataclass(frozen=True)
class Video:
    """Frames in order, `fps` of them a second."""

    frames: tuple[Path, ...]
    fps: float = DEFAULT_FPS


Part = str | Image | Video
"""What a message is made of, in the order in which it is read."""


@dataclass(frozen=True)
class Message:
    role: str
    parts: tuple[Part, ...]

    @property
    def vision(self) -> tuple[Image | Video, ...]:
        return tuple(part for part in self.parts if not isinstance(part, str))


@dataclass(frozen=True)
class Sample:
    """One conversation, and where it is written (`file`, `line` from 1) for messages about it."""

    messages: tuple[Message, ...]
    file: Path
    line: int

    @property
    def name(self) -> str:
        return f"{self.file}, line {self.line}"

    @property
    def vision(self) -> tuple[Image | Video, ...]:
        """Images and videos in the order in which they stand in the text."""
        return tuple(part for message in self.messages for part in message.vision)


def read_samples(
    path: str | Path, *, pictures: bool = True, bad: Callable[[ConfigError], None] | None = None
) -> tuple[Sample, ...]:
    """Every sample of a JSONL file; blank lines are passed over.

    Args:
        pictures: messages may have images and videos.
        bad: told of each line that is no sample, which is then passed over; None: it is raised.

    Raises:
        ConfigError: no such file, or a line that is no sample (with its number, what it says and what is allowed).
    """
    file = Path(path)
    check_readable(file)
    if not is_jsonl(file):
        raise ConfigError(f'data.path {file}: conversations need a .jsonl file with one {{"messages": [...]}} a line')
    samples: list[Sample] = []
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                samples += [_Reader(file, number, pictures).sample(raw)] if raw.strip() else []
            except ConfigError as error:
                if bad is None:
                    raise
                bad(error)
    if not samples:
        raise ConfigError(f"data.path {file} holds no sample; give one a line")
    return tuple(samples)


@dataclass(frozen=True)
class _Reader:
    """Turns one line into a sample; the methods' `where` leads from the line to the value, as in `messages[1].role`."""

    file: Path
    line: int
    pictures: bool

    def sample(self, raw: bytes) -> Sample:
        try:
            entry = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise self._wrong("not UTF-8", "one JSON object a line is needed") from None
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"not JSON ({error})", "one JSON object a line is needed") from None
        messages = self._messages_of(entry)
        if not isinstance(messages, list) or not messages:
            raise self._wrong(f"messages is {_kind(messages)}", "a list with at least one message is needed")
        sample = Sample(tuple(self._messages(messages)), self.file, self.line)
        self._check_turns(sample.messages)
        return sample

    def _messages_of(self, entry: Any) -> Any:
        if isinstance(entry, dict):
            changing = [key for key in _CHANGE_THE_TEXT if entry.get(key)]
            if changing:
                raise self._wrong(f"the line has the key {changing[0]!r}", "conversations with it are not served")
            entry = {key: value for key, value in entry.items() if key == "messages"}
        return self._object("the line", entry, required=("messages",))["messages"]

    def _messages(self, entries: list[Any]) -> Iterator[Message]:
        for index, entry in enumerate(entries):
            where = f"messages[{index}]"
            entry = self._object(where, entry, required=("role", "content"))
            if entry["role"] not in ROLES:
                raise self._wrong(f"{where}.role is {entry['role']!r}", f"allowed are {', '.join(ROLES)}")
            message = Message(entry["role"], tuple(self._parts(f"{where}.content", entry["content"])))
            if message.vision and message.role != "user":
                raise self._wrong(
                    f"{where}, of the {message.role}, has an image", "only the user's messages may have one"
                )
            yield message

    def _check_turns(self, messages: tuple[Message, ...]) -> None:
        roles = [message.role for message in messages]
        if "system" in roles[1:]:
            raise self._wrong("the system's message is not the first", "it stands before all others or not at all")
        if "assistant" not in roles:
            raise self._wrong("no message of the assistant", "its messages are what is learned; at least one is needed")
        if roles[0] == "assistant":
            raise self._wrong("the assistant has the first message", "let a user's or the system's come before it")

    def _parts(self, where: str, content: Any) -> Iterator[Part]:
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            raise self._wrong(f"{where} is {_kind(content)}", "a string or a list of parts is needed")
        for index, entry in enumerate(content):
            yield self._part(f"{where}[{index}]", entry)

    def _part(self, where: str, entry: Any) -> Part:
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind == "text":
            text = self._object(where, entry, required=("type", "text"))["text"]
            if not isinstance(text, str):
                raise self._wrong(f"{where}.text is {_kind(text)}", "a string is needed")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise self._wrong(f"{where}.text has half a surrogate pair", "whole Unicode characters are needed")
            return text
        if kind in ("image", "video") and not self.pictures:
            raise self._wrong(f"{where}.type is {kind!r}", "without vision.num_layers a model reads text alone")
        if kind == "image":
            entry = self._object(where, entry, required=("type", "image"))
            return Image(self._picture(f"{where}.image", entry["image"]))
        if kind == "video":
            return self._video(where, self._object(where, entry, required=("type", "video"), optional=("fps",)))
        given = f".type is {kind!r}" if isinstance(entry, dict) else f" is {_kind(entry)}"
        raise self._wrong(f"{where}{given}", "an object with the type text, image or video is needed")

    def _video(self, where: str, entry: dict[str, Any]) -> Video:
        frames, fps = entry["video"], entry.get("fps", DEFAULT_FPS)
        if not isinstance(frames, list) or not frames:
            raise self._wrong(f"{where}.video is {_kind(frames)}", "a list with the file of each frame is needed")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= _MAX_FPS:
            raise self._wrong(
                f"{where}.fps is {fps!r}", f"a number of frames a second, above 0 and up to {_MAX_FPS}, is needed"
            )
        paths = (self._picture(f"{where}.video[{index}]", frame) for index, frame in enumerate(frames))
        return Video(tuple(paths), float(fps))

    def _picture(self, where: str, name: Any) -> Path:
        if not isinstance(name, str) or not name or "\0" in name:
            raise self._wrong(f"{where} is {name!r}", f"a picture's path, relative to {self.file.parent}, is needed")
        path = self.file.parent / name
        try:
            there = path.is_file()
        except OSError:  # a name longer than a file system knows
            there = False
        if not there:
            raise self._wrong(f"{where} is {name!r}, and {path} is no file", "give the path of a picture that exists")
        return path

    def _object(
        self, where: str, entry: Any, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        allowed = [f"{key} (may be left out)" if key in optional else key for key in (*required, *optional)]
        if not isinstance(entry, dict):
            raise self._wrong(f"{where} is {_kind(entry)}", f"an object with {', '.join(allowed)} is needed")
        unknown = sorted(set(entry) - {*required, *optional})
        if unknown:
            raise self._wrong(f"{where} has the key {unknown[0]!r}", f"allowed are {', '.join(allowed)}")
        missing = [key for key in required if key not in entry]
        if missing:
            raise self._wrong(f"{where} has no key {missing[0]!r}", f"needed are {', '.join(required)}")
        return entry

    def _wrong(self, what: str, allowed: str) -> ConfigError:
        return ConfigError(f"data.path {self.file}, line {self.line}: {what}; {allowed}")


def _kind(value: Any) -> str:
    """What a JSON value is, for people."""
    kinds = (
        (str, "a string"),
        (bool, "true or false"),
        (int | float, "a number"),
        (list, "a list"),
        (dict, "an object"),
    )
    name = next((name for kind, name in kinds if isinstance(value, kind)), "null")
    return f"an empty {name.split()[-1]}" if value in ("", [], {}) else name
