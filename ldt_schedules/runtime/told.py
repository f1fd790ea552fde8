"""Reads what the other site tells of a microbatch: numbers of the right kind and size, or an error that names the field.

A header comes over the link, so nothing in it is trusted: not that a length is a length, nor that it fits into memory.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Callable
from typing import Any

from ldt_schedules.errors import LdtError
from ldt_schedules.runtime.microbatch_format import Told

MAX_TOKENS = 1 << 26
"""Of a microbatch; patches as well."""
_LIST_OF_LISTS = "a list of lists of whole numbers"


def segments_of(told: Told) -> list[list[int]]:
    """`"segments"`: for each sample the lengths of its segments, 1 or more; all samples equally long."""
    rows = _rows(told, "segments", lambda value: value >= 1)
    lengths = {sum(row) for row in rows}
    if len(lengths) != 1 or lengths == {0} or sum(map(sum, rows)) > MAX_TOKENS:
        raise _wrong("segments", rows, f"samples of one length, at most {MAX_TOKENS} tokens together")
    return rows


def grids_of(told: Told) -> list[list[int]]:
    """`"grids"`: `(t, h, w)` of each image, 1 or more; none: an empty list."""
    rows = _rows(told, "grids", lambda value: value >= 1)
    if any(len(row) != 3 for row in rows) or sum(t * h * w for t, h, w in rows) > MAX_TOKENS:
        raise _wrong("grids", rows, f"three numbers for each image, at most {MAX_TOKENS} patches together")
    return rows


def patches_of(told: Told) -> int:
    """How many patches the grids make."""
    return sum(t * h * w for t, h, w in grids_of(told))


def text_shape_of(told: Told) -> tuple[int, int]:
    """`"text"`: `[b, s]`."""
    value = told.get("text")
    if not isinstance(value, list) or len(value) != 2 or not all(type(one) is int and one >= 1 for one in value):
        raise _wrong("text", value, "two whole numbers, samples and tokens of each")
    if value[0] * value[1] > MAX_TOKENS:
        raise _wrong("text", value, f"at most {MAX_TOKENS} tokens together")
    return value[0], value[1]


def runs_of(told: Told, name: str, shape: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """Runs `(value, length)` that make up rows of `shape` `[b, s]`."""
    rows = told.get(name)
    if not isinstance(rows, list) or len(rows) != shape[0]:
        raise _wrong(name, rows, f"runs for each of {shape[0]} samples")
    found = []
    for row in rows:
        if not isinstance(row, list) or not all(_is_run(one) for one in row) or sum(run[1] for run in row) != shape[1]:
            raise _wrong(name, row, f"runs (value, length) of {shape[1]} tokens in all")
        found.append([(value, length) for value, length in row])
    return found


def packed_numbers_of(told: Told, name: str, num_bytes: int) -> bytearray:
    """What `zlib` and base64 made of exactly so many bytes; never unpacked further than that."""
    text = told.get(name)
    try:
        packed = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        stream = zlib.decompressobj()
        raw = bytearray(stream.decompress(packed, num_bytes + 1))
    except (binascii.Error, zlib.error, ValueError):
        raise _wrong(name, text, "bytes as zlib and base64 pack them") from None
    if len(raw) != num_bytes:
        raise _wrong(name, text, f"{num_bytes} bytes, packed")
    return raw


def _rows(told: Told, name: str, allowed: Callable[[int], bool]) -> list[list[int]]:
    rows = told.get(name)
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise _wrong(name, rows, _LIST_OF_LISTS)
    if not all(type(value) is int and allowed(value) and value <= MAX_TOKENS for row in rows for value in row):
        raise _wrong(name, rows, f"{_LIST_OF_LISTS}, 1 to {MAX_TOKENS}")
    return rows


def _is_run(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(type(one) is int and abs(one) <= MAX_TOKENS for one in value)
        and value[1] >= 1
    )


def _wrong(name: str, value: Any, wanted: str) -> LdtError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:80] + "…"
    return LdtError(f"the step header tells {name} = {shown} of a microbatch; it should be {wanted}")
