"""Reading JSON that people wrote: every mistake with its place, nothing dropped without a word."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ldt_schedules.planning.errors import ScheduleError

_MAX_DEPTH = 16
"""Our formats have 4. Python reads lists in lists to a depth at which it can no longer show them in a message."""


def parse_object(text: str) -> dict[str, Any]:
    """The one JSON object in `text`.

    Raises:
        ScheduleError: cut off, not JSON, no object, nested too deep, or a key that stands twice.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string")
        cut = "; is the file cut off?" if at_end else ""
        raise ScheduleError(f"line {error.lineno}, column {error.colno}: {error.msg}{cut}") from None
    except ScheduleError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise ScheduleError(f"this cannot be read: {error}") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(content, dict):
        raise ScheduleError(f"expected one JSON object, got {type(content).__name__}")
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise _too_deep()
    return content


def expect_keys(content: dict[str, Any], allowed: Sequence[str], what: str) -> None:
    """Raises ScheduleError for a key that is not among `allowed`."""
    for key in content:
        if key not in allowed:
            raise ScheduleError(f"unknown key {key!r}; {what} has {', '.join(allowed)}")


def get(content: dict[str, Any], key: str, kind: type) -> Any:
    """`content[key]`, which must be of this kind.

    Raises:
        ScheduleError: it is missing or of another kind.
    """
    if key not in content:
        raise ScheduleError(f'"{key}" is missing')
    value = content[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {list: "a list", dict: "an object", int: "a whole number", str: "a text"}
        raise ScheduleError(f'"{key}" is {value!r}; expected {names[kind]}')
    return value


def yes_or_no(content: dict[str, Any], key: str, where: str = "") -> bool:
    """`content[key]`, no where it is missing. Raises ScheduleError, beginning with `where`, for anything but true and false."""
    value = content.get(key, False)
    if not isinstance(value, bool):
        raise ScheduleError(f'{where}"{key}" is {value!r}; allowed are true and false')
    return value


def number_of(value: object, what: str, expected: str = "a number") -> float:
    """A number of a file, be it one of the NaN and Infinity that Python's JSON knows.

    Raises:
        ScheduleError: no number, or more digits than a float can hold.
    """
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise ScheduleError(f"{what} is {value!r}; expected {expected}")


def time_of(value: object, what: str) -> float:
    """A point in time of a step, in whatever unit the file has.

    Raises:
        ScheduleError: no finite number, or before the start of the step.
    """
    expected = "a time of 0 or more"
    time = number_of(value, what, expected)
    if not 0 <= time < math.inf:
        raise ScheduleError(f"{what} is {value!r}; expected {expected}")
    return time


def _inside(value: Any) -> list[Any]:
    return value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []


def _too_deep() -> ScheduleError:
    return ScheduleError(f"lists and objects are nested deeper than {_MAX_DEPTH} levels; no format of ours is")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key stand twice and keeps the last: a rank's row would be lost without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        count = Counter(key for key, _ in pairs)
        raise ScheduleError(f"the key {count.most_common(1)[0][0]!r} stands twice in one object")
    return content
