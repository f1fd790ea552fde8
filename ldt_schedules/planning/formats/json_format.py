"""The canonical file format of a table, `ldt-table/1`: JSON, one action a line.

    {"format": "ldt-table/1", "num_microbatches": 2,
     "stages": [{"stage": 0, "rank": 0, "name": "head", "inputs": []}, ...],
     "ranks": {"0": ["F s0 m0", "SEND_F s0 m0 ->1", ...], "1": [...]}}

A stage of several domains has one rank for each: `"rank": [1, 4]`. A table for evaluation says `"forward_only": true`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout, Stage
from ldt_schedules.planning.table import ScheduleTable

FORMAT = "ldt-table/1"
_KEYS = ("format", "num_microbatches", "stages", "ranks", "forward_only")


def dumps(table: ScheduleTable) -> str:
    """The table as text; equal tables give equal text."""
    content: dict[str, Any] = {"format": FORMAT, "num_microbatches": table.num_microbatches}
    if table.forward_only:
        content["forward_only"] = True
    content["stages"] = [
        {
            "stage": stage.index,
            "rank": stage.ranks[0] if len(stage.ranks) == 1 else list(stage.ranks),
            "name": stage.name,
            "inputs": list(stage.inputs),
        }
        for stage in table.layout.stages
    ]
    content["ranks"] = {str(rank): [str(action) for action in row] for rank, row in enumerate(table.ranks)}
    return json.dumps(content, indent=1) + "\n"


def table_hash(table: ScheduleTable) -> str:
    """sha256 of the canonical text: two sites run one table when their hashes are equal."""
    return hashlib.sha256(dumps(table).encode()).hexdigest()


def loads(text: str) -> ScheduleTable:
    """Read a table.

    Raises:
        ScheduleError: cut off, not JSON, another format, a missing or unknown key, a wrong type, an action that cannot be
            read. What the actions do is the validator's to judge.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string")
        cut = "; is the file cut off?" if at_end else ""
        raise ScheduleError(f"line {error.lineno}, column {error.colno}: {error.msg}{cut}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ScheduleError(f"this is no table: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        given = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ScheduleError(f'this is no table: "format" is {given!r}, expected "{FORMAT}"')
    for key in content:
        if key not in _KEYS:
            raise ScheduleError(f"unknown key {key!r}; a table has {', '.join(_KEYS)}")
    layout = Layout(tuple(_stage(entry, number) for number, entry in enumerate(_get(content, "stages", list))))
    ranks = _get(content, "ranks", dict)
    expected = {str(rank) for rank in range(layout.num_ranks)}
    if set(ranks) - expected:
        extra = ", ".join(sorted(set(ranks) - expected))
        raise ScheduleError(f'"ranks" has {extra}; the stages stand on ranks 0..{layout.num_ranks - 1}')
    if expected - set(ranks):
        raise ScheduleError(
            f'"ranks" has no row for {", ".join(sorted(expected - set(ranks)))}; write [] for an idle rank'
        )
    rows = {int(rank): _row(rank, row) for rank, row in ranks.items()}
    forward_only = content.get("forward_only", False)
    if not isinstance(forward_only, bool):
        raise ScheduleError(f'"forward_only" is {forward_only!r}; allowed are true and false')
    return ScheduleTable.from_rows(layout, _get(content, "num_microbatches", int), rows, forward_only)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key stand twice and keeps the last: a rank's row would be lost without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ScheduleError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return content


def _get(content: dict[str, Any], key: str, kind: type) -> Any:
    if key not in content:
        raise ScheduleError(f'"{key}" is missing')
    value = content[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {list: "a list", dict: "an object", int: "a whole number", str: "a text"}
        raise ScheduleError(f'"{key}" is {value!r}; expected {names[kind]}')
    return value


def _stage(entry: object, number: int) -> Stage:
    where = f"stage number {number}"
    if not isinstance(entry, dict):
        raise ScheduleError(f"{where}: expected an object, got {entry!r}")
    rank = entry.get("rank")
    ranks = tuple(rank) if isinstance(rank, list) else (rank,)
    inputs = entry.get("inputs", [])
    for name, values in (("rank", ranks), ("inputs", inputs if isinstance(inputs, list) else [None])):
        if any(not isinstance(value, int) or isinstance(value, bool) or value < 0 for value in values):
            raise ScheduleError(f'{where}: "{name}" is {entry.get(name)!r}; expected whole numbers from 0')
    name = entry.get("name", f"stage{number}")
    return Stage(index=_get(entry, "stage", int), name=str(name), ranks=ranks, inputs=tuple(inputs))


def _row(rank: str, row: object) -> list[Action]:
    if not isinstance(row, list):
        raise ScheduleError(f"rank {rank}: expected a list of actions, got {row!r}")
    actions = []
    for index, text in enumerate(row):
        try:
            actions.append(Action.parse(text if isinstance(text, str) else repr(text)))
        except ScheduleError as error:
            raise ScheduleError(f"rank {rank}, action {index}: {error}") from None
    return actions
