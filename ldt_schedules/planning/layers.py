"""How many transformer layers each stage holds, from what a user wrote.

Three ways to write the same split of 12 layers over head, two cloud stages and tail:

    [2, 4, 4, 2]            a list: head, cloud 1, ..., tail
    Et*2|t*4|t*4|t*2L       Megatron's layout language: E embedding, t one layer, | next stage, L loss
    (nothing)               as even as possible: 3, 3, 3, 3

In the language `x*n` repeats one character, `(...)*n` repeats a group (`Et|(tt|)*2tL`), commas and spaces are
cosmetic, and a stage with nothing between its bars holds no layer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from ldt_schedules.planning.errors import ScheduleError

MAX_SYMBOLS = 100_000
"""Longest layout after unrolling; a slip like `t*10000000000` must not fill the memory."""

_COUNT = re.compile(r"\d+")
_KNOWN = "E (embedding), t (layer), L (loss), | (next stage), (...)*n and x*n"


def parse_layers(value: str | int | Sequence[int] | None, num_layers: int, num_ranks: int) -> tuple[int, ...]:
    """Layers of each stage in forward order; `len(result)` is the number of stages.

    Args:
        value: a list of counts, a layout string, one number (an edge alone), or None for an even split.
        num_layers: transformer layers of the whole model.
        num_ranks: pipeline ranks P, the edge counted. P >= 2 has P + 1 stages (head and tail are both the edge's);
            P = 1 has one.

    Raises:
        ScheduleError: counts that are no numbers, a layout that cannot be read (with the position), another number
            of stages than P gives, or a sum other than `num_layers`.
    """
    if num_layers < 1 or num_ranks < 1:
        raise ScheduleError(f"a model needs at least 1 layer and 1 pipeline rank, got {num_layers} and {num_ranks}")
    num_stages = num_ranks + 1 if num_ranks > 1 else 1
    if value is None:
        return split_evenly(num_layers, num_stages)
    layers = read_layers(value)
    if len(layers) != num_stages:
        raise ScheduleError(
            f"layers {_shown(value)} describe {len(layers)} stages, but {num_ranks} pipeline ranks have {num_stages} "
            f"({_stage_names(num_ranks)}); give {num_stages} counts or change the number of pipeline ranks"
        )
    if sum(layers) != num_layers:
        raise ScheduleError(
            f"layers {_shown(value)} add up to {' + '.join(map(str, layers))} = {sum(layers)}, but the model has "
            f"{num_layers} layers; {_how_to_mend(layers, num_layers)}"
        )
    return layers


def read_layers(value: str | int | Sequence[int]) -> tuple[int, ...]:
    """The counts as written, not yet compared with a model.

    Raises:
        ScheduleError: counts that are no numbers, or a layout that cannot be read.
    """
    return parse_layout(value) if isinstance(value, str) else _checked_counts(value)


def stage_of_layer(layers: Sequence[int], layer: int) -> int:
    """Which entry of a split holds layer number `layer`, from 0."""
    ends = itertools.accumulate(layers)
    stage = next((stage for stage, end in enumerate(ends) if layer < end), None)
    assert stage is not None, f"{list(layers)} have no layer {layer}"
    return stage


def split_evenly(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Counts that differ by at most 1.

    What does not divide goes to the cloud's stages first, then to the tail, because the edge has little compute.
    """
    layers = [num_layers // num_stages] * num_stages
    cloud_first = [*range(1, num_stages - 1), num_stages - 1, 0]
    for stage in cloud_first[: num_layers % num_stages]:
        layers[stage] += 1
    return tuple(layers)


def parse_layout(text: str) -> tuple[int, ...]:
    """Read Megatron's layout language; only the counts are left.

    Raises:
        ScheduleError: an unknown character, a bracket or `*` out of place, E not first or L not last.
    """
    symbols = _unroll(text)
    _check_ends(text, symbols)
    stages = "".join(symbol for symbol, _ in symbols).split("|")
    return tuple(stage.count("t") for stage in stages)


_Symbols = list[tuple[str, int]]
"""Each character after unrolling, with its position (from 1) in the text, for messages."""


def _unroll(text: str) -> _Symbols:
    done: _Symbols = []
    group: _Symbols | None = None  # what has been read since an open bracket
    opened, index = 0, 0
    while index < len(text):
        char, position = text[index], index + 1
        index += 1
        if char in ", ":
            continue
        if char == "(":
            if group is not None:
                raise _bad(text, position, f"a bracket inside the bracket of position {opened}; groups do not nest")
            group, opened = [], position
            continue
        if char == ")":
            if group is None:
                raise _bad(text, position, "a closing bracket without an opening one")
            unit, group = group, None
            if text[index : index + 1] != "*":
                raise _bad(text, position, "a group must be repeated: (...)*n")
        elif char in "EtL|":
            unit = [(char, position)]
        else:
            raise _bad(text, position, _why_unknown(char))
        times, index = _repetition(text, index)
        target = done if group is None else group
        if len(target) + len(unit) * times > MAX_SYMBOLS:
            raise _bad(text, position, f"more than {MAX_SYMBOLS} characters after unrolling")
        target.extend(unit * times)
    if group is not None:
        raise _bad(text, opened, "this bracket is never closed")
    return done


def _repetition(text: str, index: int) -> tuple[int, int]:
    """`*n` at `index`: how often, and where to read on. Without it: once."""
    if text[index : index + 1] != "*":
        return 1, index
    count = _COUNT.match(text, index + 1)
    if count is None:
        raise _bad(text, index + 1, "* must be followed by a number")
    # int() of a very long digit string is refused by Python itself; no layout needs more than nine digits.
    return (int(count.group()) if len(count.group()) < 10 else MAX_SYMBOLS + 1), count.end()


def _check_ends(text: str, symbols: _Symbols) -> None:
    for char, name, wanted, place in (("E", "embedding", 0, "begin"), ("L", "loss", len(symbols) - 1, "end")):
        found = [i for i, (symbol, _) in enumerate(symbols) if symbol == char]
        for i in found:
            if i != wanted:
                raise _bad(text, symbols[i][1], f"{char} ({name}) may stand only at the {place} of the layout, once")
        if not found:
            raise ScheduleError(f"layout {text!r} must {place} with {char} ({name})")


def _why_unknown(char: str) -> str:
    if char == "m":
        return "m (multi-token prediction) is not supported here"
    if char == "*":
        return "* without something to repeat before it"
    return f"unknown character {char!r}; known are {_KNOWN}"


def _bad(text: str, position: int, why: str) -> ScheduleError:
    return ScheduleError(f"layout {text!r}, position {position}: {why}")


def _checked_counts(value: int | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(value, int | list | tuple):
        raise ScheduleError(f"layers {value!r}: a list of counts, a layout such as Et|t*3|tL or one number is needed")
    counts = [value] if isinstance(value, int) else list(value)
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ScheduleError(f"layers {_shown(value)}: {count!r} is not a number of layers (0 or more)")
    return tuple(counts)


def _how_to_mend(layers: tuple[int, ...], num_layers: int) -> str:
    missing = num_layers - sum(layers)
    change = f"add {missing}" if missing > 0 else f"take away {-missing}"
    return f"{change}, or set the model's number of layers to {sum(layers)}"


def _stage_names(num_ranks: int) -> str:
    if num_ranks == 1:
        return "the edge alone"
    clouds = "cloud 1" if num_ranks == 2 else f"cloud 1..{num_ranks - 1}"
    return f"head, {clouds}, tail"


def _shown(value: str | int | Sequence[int]) -> str:
    return str(list(value)) if isinstance(value, list | tuple) else repr(value)
