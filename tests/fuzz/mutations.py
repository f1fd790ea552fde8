"""Broken files, made from good ones: what a slip of an editor, a bad disk or somebody who means harm would leave."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from typing import Any

Path = tuple[Any, ...]
"""Keys and positions that lead to a value inside JSON."""


def nested(depth: int, inner: Any = 0) -> Any:
    """A list in a list in a list …"""
    for _ in range(depth):
        inner = [inner]
    return inner


OTHERS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 10**12, -(10**20), 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"),
    float("inf"), float("-inf"), "", "0", "x", "-1", "nan", "\ud800", "\0", "٣", "F s0 m0", "a" * 5000, "[",
    [], [0], [0, 0], [None], [[]], {}, {"a": 1}, {"": {}}, nested(40), nested(200),
)  # fmt: skip
"""What may stand where something else is expected."""
TOKENS = (
    "0", "-1", "1", "99", "999999999", "9" * 400, "9" * 5000, "1e999", "-0.0", "NaN", "Infinity", "null", "true", '"x"',
    "[]", "{}", "[" * 50, "0x1f", "٣", "1_0", "{", "}", '"', ",", "\x00", "\ufeff", "\r", "é",
)  # fmt: skip
_NUMBER = re.compile(r"\d+")


def broken_text(text: str, rng: random.Random) -> str:
    """The text after one to three slips."""
    for _ in range(rng.randint(1, 3)):
        text = rng.choice((_lines, _lines, _number, _number, _character, _cut, _piece))(text, rng)
    return text


def broken_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content after one to three bad bytes, or cut off."""
    raw = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        if raw:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw[: rng.randrange(len(raw))] if raw and rng.random() < 0.2 else raw)


def broken_value(value: Any, rng: random.Random) -> Any:
    """JSON after one or two slips: another value, a key too many or too few, entries twice or in another order."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 2)):
        path = rng.choice(list(paths(value)))
        if not path:
            return other_value(rng)
        inner = at(value, path[:-1])
        _break_entry(inner, path[-1], rng)
    return value


def other_value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(OTHERS))


def paths(value: Any, start: Path = ()) -> Iterator[Path]:
    """To every value inside JSON, itself first."""
    yield start
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*start, key))


def at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def everything_once(value: Any, others: tuple[Any, ...] = OTHERS) -> Iterator[Any]:
    """The value with every one of `others` at every path, and with every entry left out."""
    for path in paths(value):
        for other in others:
            yield _with(value, path, other)
        if path:
            changed = copy.deepcopy(value)
            del at(changed, path[:-1])[path[-1]]
            yield changed


def as_text(value: Any) -> str:
    """JSON as Python writes it, NaN and Infinity included."""
    return json.dumps(value, indent=1)


def _with(value: Any, path: Path, other: Any) -> Any:
    if not path:
        return other
    changed = copy.deepcopy(value)
    at(changed, path[:-1])[path[-1]] = other
    return changed


def _break_entry(inner: Any, key: Any, rng: random.Random) -> None:
    how = rng.randrange(5)
    if how == 0:
        del inner[key]
    elif how == 1 and isinstance(inner, list):
        inner.insert(rng.randint(0, len(inner)), copy.deepcopy(inner[key]))
    elif how == 1:
        inner[rng.choice(("", "extra", "format", "stages", "0"))] = inner.pop(key)
    elif how == 2 and isinstance(inner, list):
        other = rng.randrange(len(inner))
        inner[key], inner[other] = inner[other], inner[key]
    elif how == 3 and isinstance(inner[key], int | float):
        inner[key] = rng.choice((inner[key] + 1, inner[key] - 1, -inner[key], inner[key] * 10**9))
    else:
        inner[key] = other_value(rng)


def _lines(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    if not lines:
        return text
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    how = rng.randrange(3)
    if how == 0:
        del lines[one]
    elif how == 1:
        lines.insert(other, lines[one])
    else:
        lines[one], lines[other] = lines[other], lines[one]
    return "".join(lines)


def _number(text: str, rng: random.Random) -> str:
    found = list(_NUMBER.finditer(text))
    if not found:
        return text
    one = rng.choice(found)
    return text[: one.start()] + rng.choice(TOKENS) + text[one.end() :]


def _character(text: str, rng: random.Random) -> str:
    place = rng.randint(0, len(text))
    return text[:place] + rng.choice(TOKENS) + text[place + rng.randrange(2) :]


def _cut(text: str, rng: random.Random) -> str:
    return text[: rng.randint(0, len(text))]


def _piece(text: str, rng: random.Random) -> str:
    """A piece of it once more, somewhere else."""
    one, two, where = (rng.randint(0, len(text)) for _ in range(3))
    return text[:where] + text[min(one, two) : max(one, two)][:200] + text[where:]
