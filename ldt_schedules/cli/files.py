"""Reading the text files that users name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.errors import ScheduleError

_Content = TypeVar("_Content")


def reading(path: Path, read: Callable[[str], _Content], expected: str) -> _Content:
    """What `read` makes of the file's text.

    Raises:
        ConfigError: it cannot be read, or is no text.
        ScheduleError: `read` refuses it; the file is named.
    """
    try:
        return read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text; expected {expected}") from None
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None


def writing(path: Path, text: str) -> None:
    """Raises ConfigError when the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
