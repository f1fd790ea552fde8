"""Each check has a table that fails it, made from a good one by a single change."""

from __future__ import annotations

import random

import pytest

from ldt_schedules.planning import Action, Layout, ScheduleError, ScheduleTable, check, plan, validate

GOOD = plan("ldt_1f1b", Layout.u(3), 4)


def changed(rank, change, table=GOOD):
    """The table with `change(list of action texts)` applied to one row."""
    rows = [[str(action) for action in row] for row in table.ranks]
    rows[rank] = change(rows[rank])
    return ScheduleTable.from_rows(
        table.layout,
        table.num_microbatches,
        [[Action.parse(text) for text in row] for row in rows],
        table.forward_only,
    )


def without(text):
    return lambda row: [entry for entry in row if entry != text]


def replaced(text, by):
    return lambda row: [by if entry == text else entry for entry in row]


def swapped(one, other):
    return lambda row: [{one: other, other: one}.get(entry, entry) for entry in row]


def twice(text):
    return lambda row: [copy for entry in row for copy in ([entry, entry] if entry == text else [entry])]


BROKEN = {
    "no such stage": (0, replaced("F s0 m0", "F s9 m0"), "action", "there is no stage 9"),
    "no such microbatch": (0, replaced("F s0 m3", "F s0 m4"), "action", "there is no microbatch 4"),
    "wrong rank": (1, replaced("F s1 m0", "F s2 m0"), "action", "stage 2 of microbatch 0 stands on rank 2, not on 1"),
    "peer holds no neighbour": (
        0,
        replaced("SEND_F s0 m0 ->1", "SEND_F s0 m0 ->2"),
        "peer",
        "there is stage 1 on rank 1",
    ),
    "forward twice": (1, twice("F s1 m2"), "twice", "made twice"),
    "backward twice": (1, twice("B s1 m2"), "twice", "taken twice"),
    "send twice": (0, twice("SEND_F s0 m1 ->1"), "twice", "taken twice"),
    "forward missing": (1, without("F s1 m1"), "incomplete", "F s1 m1 is missing"),
    "backward missing": (0, without("B s0 m1"), "incomplete", "B s0 m1 (or I and W) is missing"),
    "backward missing, activations kept": (0, without("B s0 m1"), "left over", "saved activations of s0 m1"),
    "send missing": (0, without("SEND_F s0 m1 ->1"), "unmatched", "nobody sends it"),
    "receive missing": (1, without("RECV_F s1 m1 <-0"), "unmatched", "nobody receives it"),
    "receive missing, at its user": (1, without("RECV_F s1 m1 <-0"), "missing", "no action of this rank makes"),
    "backward before forward": (0, swapped("F s3 m0", "B s3 m0"), "order", "comes only later"),
    "send before its producer": (0, swapped("F s0 m0", "SEND_F s0 m0 ->1"), "order", "comes only later"),
    "receives of a lane swapped": (1, swapped("RECV_F s1 m0 <-0", "RECV_F s1 m1 <-0"), "fifo", "at its place"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_one_change_one_named_violation(what):
    rank, change, name, message = BROKEN[what]
    table = changed(rank, change)
    assert table != GOOD, "the change changed nothing"
    found = validate(table)
    hits = [violation for violation in found if violation.check == name and message in violation.message]
    assert hits, [violation.render() for violation in found]
    assert all(violation.render() for violation in found)


def test_a_violation_shows_its_place():
    violation = next(v for v in validate(changed(1, twice("F s1 m2"))) if v.check == "twice")
    assert violation.rank == 1 and violation.action == "F s1 m2"
    marked = [line for line in violation.context if line.startswith(">")]
    assert len(marked) == 1 and marked[0].endswith("F s1 m2")
    assert 4 <= len(violation.context) <= 7
    assert "rank 1, action" in violation.render()


def test_a_deadlock_is_found_and_says_who_waits_for_what():
    """Both neighbours want the other's message first: sound as dataflow, and nobody can begin."""
    table = plan("gpipe", Layout.u(2), 2)

    def tail_of_0_first(row):
        start = [a for a in row if a.endswith("s0 m1") and a.startswith("F")] + ["SEND_F s0 m1 ->1"]
        rest = [a for a in row if a not in start]
        position = rest.index("F s2 m0") + 1
        return rest[:position] + start + rest[position:]

    def both_forwards_need_m1(row):
        first = ["RECV_F s1 m0 <-0", "RECV_F s1 m1 <-0", "F s1 m1"]
        return first + [a for a in row if a not in first]

    broken = changed(1, both_forwards_need_m1, changed(0, tail_of_0_first, table))
    found = validate(broken)
    assert {violation.check for violation in found} == {"deadlock"}, [v.render() for v in found]
    assert sorted(violation.rank for violation in found) == [0, 1]
    assert any("waits for ever for the input of s1 m1 from s0" in violation.message for violation in found)


def test_the_other_checks_of_forward_only_tables():
    table = plan("ldt_1f1b", Layout.u(2), 2, forward_only=True)
    assert validate(table) == []
    found = validate(changed(1, lambda row: [*row, "B s1 m0"], table))
    assert found and "no backward" in found[0].message


def test_all_violations_come_at_once():
    table = changed(0, without("F s0 m0"), changed(2, without("B s2 m3")))
    with pytest.raises(ScheduleError) as caught:
        check(table)
    assert "F s0 m0 is missing" in str(caught.value) and "B s2 m3" in str(caught.value)


@pytest.mark.parametrize("seed", range(300))
def test_random_damage_is_noticed_and_never_crashes(seed):
    """Delete, repeat, redirect or swap anywhere. What still passes must be a table that still runs."""
    rng = random.Random(seed)
    table = plan(rng.choice(["gpipe", "ldt_1f1b"]), Layout.u(rng.randint(2, 4)), rng.randint(1, 5))
    rank = rng.randrange(table.layout.num_ranks)

    def damage(row):
        row = list(row)
        i, j = rng.randrange(len(row)), rng.randrange(len(row))
        kind = rng.choice(["delete", "repeat", "swap", "stage", "peer"])
        if kind == "delete":
            del row[i]
        elif kind == "repeat":
            row.insert(j, row[i])
        elif kind == "swap":
            row[i], row[j] = row[j], row[i]
        else:
            action = Action.parse(row[i])
            stage = action.stage + 1 if kind == "stage" else action.stage
            peer = None if action.peer is None else action.peer + (kind == "peer")
            row[i] = str(Action(action.kind, stage, action.microbatches, peer))
        return row

    broken = changed(rank, damage, table)
    found = validate(broken)
    moved = sorted(map(str, broken.ranks[rank])) == sorted(map(str, table.ranks[rank]))
    assert found or moved, "a table with other actions than its original passed"
