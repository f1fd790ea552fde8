"""The canonical file format of a table, `ldt-table/1`: JSON, one action a line.

    {"format": "ldt-table/1", "num_microbatches": 2,
     "stages": [{"stage": 0, "rank": 0, "name": "head", "inputs": []}, ...],
     "ranks": {"0": ["F s0 m0", "SEND_F s0 m0 ->1", ...], "1": [...]}}

A stage of several domains has one rank for each: `"rank": [1, 4]`. A table for evaluation says `"forward_only": true`.
`"num_ranks"` is written where some rank has no stage, `"domain_of"` where microbatch m is not of domain m mod D, `"label"`
of a stage where a grid calls it by another number than its own, `"frozen": true` of one that is.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats.json_object import expect_keys, get, parse_object, yes_or_no
from ldt_schedules.planning.layout import Layout, Stage
from ldt_schedules.planning.table import ScheduleTable

FORMAT = "ldt-table/1"
LAYOUT_KEYS = ("num_ranks", "domain_of", "stages")
_ROWS_NAMED = 20
_KEYS = ("format", "num_microbatches", *LAYOUT_KEYS, "ranks", "forward_only")


def dumps(table: ScheduleTable) -> str:
    """The table as text; equal tables give equal text."""
    return json.dumps(as_object(table), indent=1) + "\n"


def as_object(table: ScheduleTable) -> dict[str, Any]:
    """The table as what JSON can write."""
    content: dict[str, Any] = {"format": FORMAT, "num_microbatches": table.num_microbatches}
    if table.forward_only:
        content["forward_only"] = True
    content.update(layout_content(table.layout))
    content["ranks"] = {str(rank): [str(action) for action in row] for rank, row in enumerate(table.ranks)}
    return content


def layout_content(layout: Layout) -> dict[str, Any]:
    """The keys of a file that say which stages there are: `LAYOUT_KEYS`, as far as they are needed."""
    content: dict[str, Any] = {}
    if layout.has_idle_ranks:
        content["num_ranks"] = layout.num_ranks
    if layout.domain_of:
        content["domain_of"] = list(layout.domain_of)
    content["stages"] = [
        {
            "stage": stage.index,
            "rank": stage.ranks[0] if len(stage.ranks) == 1 else list(stage.ranks),
            "name": stage.name,
            "inputs": list(stage.inputs),
            **({} if stage.label is None else {"label": stage.label}),
            **({"frozen": True} if stage.frozen else {}),
        }
        for stage in layout.stages
    ]
    return content


def table_hash(table: ScheduleTable) -> str:
    """sha256 of the canonical text: two sites run one table when their hashes are equal."""
    return hashlib.sha256(dumps(table).encode()).hexdigest()


def loads(text: str) -> ScheduleTable:
    """Read a table.

    Raises:
        ScheduleError: cut off, not JSON, another format, a missing or unknown key, a wrong type, an action that cannot be
            read. What the actions do is the validator's to judge.
    """
    content = parse_object(text)
    if content.get("format") != FORMAT:
        raise ScheduleError(f'this is no table: "format" is {content.get("format")!r}, expected "{FORMAT}"')
    expect_keys(content, _KEYS, "a table")
    layout = read_layout(content)
    ranks = get(content, "ranks", dict)
    expected = {str(rank) for rank in range(layout.num_ranks)}
    if set(ranks) - expected:
        extra = ", ".join(sorted(set(ranks) - expected))
        raise ScheduleError(f'"ranks" has {extra}; the stages stand on ranks 0..{layout.num_ranks - 1}')
    missing = sorted(expected - set(ranks), key=int)
    if missing:
        more = f" and {len(missing) - _ROWS_NAMED} more" if len(missing) > _ROWS_NAMED else ""
        raise ScheduleError(
            f'"ranks" has no row for {", ".join(missing[:_ROWS_NAMED])}{more}; write [] for an idle rank'
        )
    rows = {int(rank): _row(rank, row) for rank, row in ranks.items()}
    forward_only = yes_or_no(content, "forward_only")
    return ScheduleTable.from_rows(layout, get(content, "num_microbatches", int), rows, forward_only)


def read_layout(content: dict[str, Any]) -> Layout:
    """What `layout_content` wrote.

    Raises:
        ScheduleError: a key that is missing or of a wrong type, or stages that are no layout.
    """
    stages = tuple(_stage(entry, number) for number, entry in enumerate(get(content, "stages", list)))
    domain_of = get(content, "domain_of", list) if "domain_of" in content else []
    if any(not isinstance(domain, int) or isinstance(domain, bool) for domain in domain_of):
        raise ScheduleError('"domain_of" must be a list with a whole number for each microbatch')
    num_ranks = get(content, "num_ranks", int) if "num_ranks" in content else 0
    return Layout(stages, num_ranks, tuple(domain_of))


def _stage(entry: object, number: int) -> Stage:
    where = f"stage number {number}"
    if not isinstance(entry, dict):
        raise ScheduleError(f"{where}: expected an object, got {entry!r}")
    rank = entry.get("rank")
    ranks = tuple(rank) if isinstance(rank, list) else (rank,)
    inputs = entry.get("inputs", [])
    label = get(entry, "label", int) if "label" in entry else None
    for name, values in (("rank", ranks), ("inputs", inputs if isinstance(inputs, list) else [None])):
        if any(not isinstance(value, int) or isinstance(value, bool) or value < 0 for value in values):
            raise ScheduleError(f'{where}: "{name}" is {entry.get(name)!r}; expected whole numbers from 0')
    name = str(entry.get("name", f"stage{number}"))
    frozen = yes_or_no(entry, "frozen", f"{where}: ")
    return Stage(get(entry, "stage", int), name, ranks, tuple(inputs), label, frozen)


def _row(rank: str, row: object) -> list[Action]:
    if not isinstance(row, list):
        raise ScheduleError(f"rank {rank}: expected a list of actions, got {row!r}")
    actions = []
    for index, text in enumerate(row):
        try:
            actions.append(read_action(text))
        except ScheduleError as error:
            raise ScheduleError(f"rank {rank}, action {index}: {error}") from None
    return actions


def read_action(text: object) -> Action:
    """The action that an entry of a file stands for. Raises ScheduleError, also for what is no text."""
    return Action.parse(text if isinstance(text, str) else repr(text))
