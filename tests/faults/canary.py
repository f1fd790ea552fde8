"""A text in which every window is marked, and a listener that looks for the marks in everything that leaves a process."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

import torch

MARK = bytes((201, 17, 242, 99, 180, 53, 228, 74))
"""Eight bytes that differ; the byte tokenizer makes of each its own number. The whole corpus repeats them."""
WINDOW = 6


def text(length: int) -> str:
    """Of so many characters; read as bytes by the tokenizer it is MARK again and again, as latin-1."""
    return (MARK.decode("latin-1") * (length // len(MARK) + 1))[:length]


def marked_tokens(ids: Iterable[int]) -> list[bytes]:
    """How a run of these token ids (or labels, which are the same one place on) may stand in a buffer."""
    numbers = list(ids)
    found = []
    for start in range(len(numbers)):
        window = [numbers[(start + place) % len(numbers)] for place in range(WINDOW)]
        found += [struct.pack(f"<{WINDOW}{kind}", *window) for kind in "qihHfd"]
        found += [
            torch.tensor(window, dtype=kind).view(torch.uint8).numpy().tobytes()
            for kind in (torch.bfloat16, torch.half)
        ]
        found += [bytes(window)] if max(window) < 256 else []
        found += [", ".join(map(str, window)).encode(), ",".join(map(str, window)).encode()]
    return found


class Listener:
    """Hears every buffer that leaves this process, and remembers those with marks in them.

    Attributes:
        heard: how many buffers, and bytes.
        found: where a mark was, and which.
    """

    def __init__(self, marks: list[bytes]) -> None:
        self.marks = marks
        self.buffers = self.num_bytes = 0
        self.found: list[str] = []

    def hear(self, where: str, content: Any) -> None:
        for raw in _bytes_of(content):
            self.buffers += 1
            self.num_bytes += len(raw)
            if any(mark in raw for mark in self.marks):
                self.found.append(f"{where}: {len(raw)} bytes")

    def tap(self, link: Any) -> None:
        """Listen to a link: its lanes, its sums, its store and its watch."""
        for lane, channel in link.channels.items():
            channel.group = _Tapped(channel.group, self, lane.name)
        link.scalars = _Tapped(link.scalars, self, "scalars")
        link.store = _Tapped(link.store, self, "store")
        lines = link.watch._lines
        lines.connection = _Tapped(lines.connection, self, "watch")


class _Tapped:
    """Passes everything on, after it has been heard."""

    def __init__(self, inner: Any, listener: Listener, where: str) -> None:
        self._inner, self._listener, self._where = inner, listener, where

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not callable(attribute):
            return attribute

        def heard(*arguments: Any, **named: Any) -> Any:
            self._listener.hear(f"{self._where}.{name}", [arguments, list(named.values())])
            return attribute(*arguments, **named)

        return heard


def _bytes_of(content: Any) -> Iterator[bytes]:
    if isinstance(content, torch.Tensor):
        yield content.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(content, (bytes, bytearray, memoryview)):
        yield bytes(content)
    elif isinstance(content, str):
        yield content.encode(errors="surrogateescape")
    elif isinstance(content, (list, tuple)):
        for one in content:
            yield from _bytes_of(one)
    elif isinstance(content, dict):
        yield from _bytes_of(list(content.items()))
