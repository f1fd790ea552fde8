"""Tables, whoever wrote them: refused by a ScheduleError, or accepted, judged, written and read again."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ldt_schedules.planning import Layout, ScheduleTable, Stage, plan, read_table, write_table
from ldt_schedules.planning.formats import FORMATS, trace_json
from ldt_schedules.planning.progress import Semantics
from ldt_schedules.planning.simulator import simulate
from ldt_schedules.planning.validator import validate
from tests.fuzz.mutations import OTHERS, TOKENS, as_text, broken_text, broken_value, everything_once, nested
from tests.fuzz.reading import inputs, read, seeds, show

U = plan("ldt_1f1b", Layout.u(3), 2)
ROOTS = plan("gpipe", Layout.roots({"audio": 0, "text": 1}, {"join": 2, "last": 0}), 2)
FROZEN = plan("gpipe", Layout.u(3).freeze({0}), 2)
DOMAINS = plan("gpipe", Layout.u(2, 2), 3)
IDLE = plan("gpipe", Layout((Stage(0, "a", (0,), ()), Stage(1, "b", (2,), (0,))), 3), 1)
EVALUATION = plan("ldt_1f1b", Layout.u(2), 2, forward_only=True)
WRITTEN = {
    "json": (U, ROOTS, FROZEN, DOMAINS, IDLE, EVALUATION),
    "grid": (U, plan("gpipe", Layout.laps(2), 2), plan("gpipe", Layout.roots({"a": 0, "b": 1}, {"c": 2, "d": 3}), 2)),
    "csv": (U, FROZEN, EVALUATION),
}


@cache
def texts(name: str) -> list[str]:
    return [write_table(table, name) for table in WRITTEN[name]]


@cache
def contents() -> list[object]:
    return [json.loads(text) for text in texts("json")]


def judge(text: str) -> ScheduleTable | None:
    """Read a table; of one that is accepted, all that is done with it before it runs."""
    show(text)
    table = read(read_table, text)
    if table is None:
        return None
    for semantics in Semantics:
        for violation in read(validate, table, semantics) or ():
            assert violation.render()
    for name in FORMATS:
        again = read(write_table, table, name)
        if again is not None and (name == "json" or name == format_of(text)):
            assert read_table(again) == table, f"{name} reads back another table"
    return table


def format_of(text: str) -> str:
    beginning = text.lstrip()
    return "json" if beginning.startswith("{") else "grid" if beginning.startswith("Rank ") else "csv"


@pytest.mark.parametrize("name", WRITTEN)
def test_the_good_ones_are_accepted(name: str) -> None:
    for text, table in zip(texts(name), WRITTEN[name], strict=True):
        read_back = judge(text)
        assert read_back is not None and read_back.ranks == table.ranks and not validate(read_back)


@inputs(400)
@given(st.one_of(st.text(max_size=60), st.text('0123456789FBIWSENDRCV_,(){}[]":- \n\r\tRankStep', max_size=80)))
@example("")
@example("{" * 100_000)
@example('{"a":' * 100_000)
@example('{"format": ' + "[" * 100_000)
@example("0F0\n" + "\n" * 100_000)
@example("Rank 0\n" * 1000)
@example("Rank " + " Rank ".join(map(str, range(3000))))
def test_any_text(text: str) -> None:
    judge(text)


@inputs(400)
@given(st.sampled_from(("Rank 0 Rank 1\nStep 00: ", "0F0,", '{"format": "ldt-table/1", ')), st.text(max_size=40))
def test_any_text_behind_a_good_beginning(beginning: str, text: str) -> None:
    judge(beginning + text)


@pytest.mark.parametrize("name", WRITTEN)
@inputs(700)
@given(seed=seeds)
def test_texts_with_slips(name: str, seed: int) -> None:
    rng = random.Random(seed)
    judge(broken_text(rng.choice(texts(name)), rng))


@inputs(900)
@given(seeds)
def test_json_with_slips(seed: int) -> None:
    rng = random.Random(seed)
    judge(as_text(broken_value(rng.choice(contents()), rng)))


def test_every_type_at_every_place() -> None:
    """Not by chance: each of some forty values at each of the places of a small table, and each place left out."""
    count = 0
    for table in (plan("gpipe", Layout.u(2), 1), IDLE):
        for value in everything_once(json.loads(write_table(table, "json"))):
            judge(as_text(value))
            count += 1
    assert count > 40 * len(OTHERS)


@inputs(300)
@given(seeds)
def test_rows_of_other_actions(seed: int) -> None:
    """What can be read, and is nonsense: the validator says so, whatever it is."""
    rng = random.Random(seed)
    table = rng.choice(WRITTEN["json"])
    known = [action for row in table.ranks for action in row]

    def any_action() -> object:
        action = rng.choice(known)
        numbers = tuple(rng.sample(range(4), rng.randint(1, 3)))
        peer = None if action.kind.is_compute else rng.randrange(5)
        other = None if peer is None or rng.random() < 0.6 else rng.randrange(5)
        return replace(action, stage=rng.randrange(5), microbatches=numbers, peer=peer, other=other)

    rows = [[any_action() if rng.random() < 0.3 else action for action in row] for row in table.ranks]
    for row in rows:
        if rng.random() < 0.3:
            rng.shuffle(row)
    judge(write_table(ScheduleTable.from_rows(table.layout, table.num_microbatches, rows, table.forward_only), "json"))


@inputs(500)
@given(seeds)
def test_traces(seed: int) -> None:
    rng = random.Random(seed)
    table = rng.choice((U, DOMAINS))
    timeline = simulate(table.layout, table.ranks)
    text = trace_json.dumps(trace_json.Trace(table.layout, table.num_microbatches, timeline, "units"))
    text = as_text(broken_value(json.loads(text), rng)) if rng.random() < 0.6 else broken_text(text, rng)
    show(text)
    trace_json.is_trace(text)
    trace = read(trace_json.loads, text)
    if trace is not None:
        assert trace_json.loads(trace_json.dumps(trace)) == trace


def test_deep_nesting_at_every_depth() -> None:
    """There are depths at which Python reads a list and then cannot show it."""
    for depth in range(1, 1100, 7):
        for key in ("stages", "name", "ranks", "num_microbatches"):
            judge(as_text({"format": "ldt-table/1", key: 0}).replace(": 0", ": " + "[" * depth + "]" * depth))
    assert judge(json.dumps(nested(900)) + TOKENS[0]) is None
