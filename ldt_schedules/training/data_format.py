"""What the lines of a .jsonl file hold: documents or conversations. Only the edge can know, and only it asks.

So the cloud needs no key for it: whether samples have segments is told with each step (`runtime/step_header.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.corpus import is_jsonl

if TYPE_CHECKING:
    from ldt_schedules.training.config import TrainConfig

_KEYS = ("text", "messages")


def holds_messages(config: TrainConfig) -> bool:
    """Is the run trained on conversations? A file that is not there holds none: who opens it says that it is missing.

    Raises:
        ConfigError: `data.format` is auto, and the first line says neither or both.
    """
    data = config.data
    if config.has_vision or data.format != "auto":
        return config.has_vision or data.format == "messages"
    if data.path is None or not is_jsonl(Path(data.path)):
        return False
    first = _first_line(Path(data.path))
    if not isinstance(first, dict):
        return False  # reading it as text says what is wrong, and where
    found = [key for key in _KEYS if key in first]
    if len(found) != 1:
        has = f"has both {' and '.join(_KEYS)}" if found else f"has the keys {', '.join(first) or '(none)'}"
        raise ConfigError(
            f"data.path {data.path}: its first line {has}; data.format auto needs one of `text` (documents) and `messages` "
            "(conversations); name it: data.format=text or data.format=messages"
        )
    return found == ["messages"]


def has_segments(config: TrainConfig) -> bool:
    """Does a sample of text hold more than tokens that may all be seen from behind: other conversations, or padding before
    them? Then the middle layers must be told where each begins."""
    return (
        not config.has_vision and holds_messages(config) and (config.data.packing or config.data.padding_side == "left")
    )


def _first_line(file: Path) -> Any:
    """The first line that is not blank, read; None where that is no JSON, or no file that can be read."""
    try:
        with file.open("rb") as stream:
            raw = next((line for line in stream if line.strip()), b"")
        return json.loads(raw)
    except (OSError, ValueError, RecursionError):
        return None
