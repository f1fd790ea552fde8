"""Each check has a table that fails it, made from a good one by a single change."""

from __future__ import annotations

import random

import pytest

from ldt_schedules.planning import Action, Costs, Layout, ScheduleError, ScheduleTable, Stage, check, plan, validate
from ldt_schedules.planning.lowering import lower
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.progress import Semantics, circle, waiting_forever

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


def table_of(layout, microbatches, *rows):
    return ScheduleTable.from_rows(
        layout, microbatches, [[Action.parse(text) for text in row.split(", ")] if row else [] for row in rows]
    )


def only(found, name):
    assert {violation.check for violation in found} == {name}, [violation.render() for violation in found]
    return found


def test_a_circle_is_told_with_its_ranks_and_actions():
    """Each rank wants to receive what the other sends only after its own receive."""
    table = plan("gpipe", Layout.u(2), 2)

    def tail_first(row):
        moved = ["F s0 m1", "SEND_F s0 m1 ->1"]
        rest = [entry for entry in row if entry not in moved]
        position = rest.index("F s2 m0") + 1
        return [*rest[:position], *moved, *rest[position:]]

    def second_first(row):
        first = ["RECV_F s1 m0 <-0", "RECV_F s1 m1 <-0", "F s1 m1"]
        return first + [entry for entry in row if entry not in first]

    broken = changed(1, second_first, changed(0, tail_first, table))
    found = only(validate(broken), "deadlock")
    for violation in found:
        assert "; the circle: rank 0 at F s2 m0 waits for rank 1 at F s1 m1 waits for rank 0 at F s2 m0" in (
            violation.message
        )
        assert "(even if messages are buffered)" in violation.message
        assert violation.message.endswith("; it runs under none of buffered, rendezvous and blocking messages")
    assert {(violation.rank, violation.action) for violation in found} == {(0, "F s2 m0"), (1, "F s1 m1")}
    assert [one.rank for one in circle(waiting_forever(broken))] == [0, 1]


PAIR = Layout((Stage(0, "first", (0,), ()), Stage(1, "last", (1,), (0,))))


def test_the_three_assumptions_have_their_own_words():
    """A send before the receive on both sides: only when each holds up its rank does nobody go on."""
    both_roots = Layout(
        (Stage(0, "a", (0,), ()), Stage(1, "b", (1,), ()), Stage(2, "c", (1,), (0,)), Stage(3, "d", (0,), (1,)))
    )

    def rows(*texts):
        return ScheduleTable.from_rows(
            both_roots, 1, [[Action.parse(text) for text in row.split(", ")] for row in texts], forward_only=True
        )

    crossing = rows(
        "F s0 m0, SEND_F s0 m0 ->1, RECV_F s3 m0 <-1, F s3 m0",
        "F s1 m0, SEND_F s1 m0 ->0, RECV_F s2 m0 <-0, F s2 m0",
    )
    assert validate(crossing) == []
    found = only(validate(crossing, Semantics.BLOCKING), "deadlock")
    assert all("(when every SEND and RECV holds up its rank)" in violation.message for violation in found)
    assert all("rank 0 at SEND_F s0 m0 ->1 waits for rank 1 at SEND_F s1 m0 ->0" in v.message for v in found)
    runs = "; it runs under buffered and rendezvous messages, not under blocking"
    assert all(violation.message.endswith(runs) for violation in found)
    assert waiting_forever(crossing, Semantics.BUFFERED) == []


def test_a_lane_that_stands_still_only_without_mailboxes():
    """Ranks 0, 2 and 4 are even: what a lower one sends a higher one goes on one lane of each (`channels`). Rank 0 has
    posted a send to 2 before one to 4, rank 2 a send to 4 before its receive from 0, rank 4 its receive from 0 before that
    from 2: on each lane the first message waits for another that is second somewhere else."""
    stages = [Stage(rank, f"root{rank}", (rank,), ()) for rank in range(5)]
    joins = [Stage(5, "two", (2,), (0,)), Stage(6, "four", (4,), (0, 2))]
    layout = Layout((*stages, *joins))
    table = ScheduleTable.from_rows(
        layout,
        1,
        [
            [Action.parse(text) for text in row.split(", ")]
            for row in (
                "F s0 m0, SEND_F s0 m0 ->2, SEND_F s0 m0 ->4",
                "F s1 m0",
                "F s2 m0, SEND_F s2 m0 ->4, RECV_F s5 m0 <-0, F s5 m0",
                "F s3 m0",
                "F s4 m0, RECV_F s6 m0 <-0, RECV_F s6 m0 <-2, F s6 m0",
            )
        ],
        forward_only=True,
    )
    found = only(validate(table), "deadlock")
    assert all("(when each lane of a rank works in order)" in violation.message for violation in found)
    assert all("it runs under buffered messages, not under rendezvous" in violation.message for violation in found)
    assert waiting_forever(table, Semantics.BUFFERED) == []
    assert len(waiting_forever(table, Semantics.RENDEZVOUS)) >= 2
    assert [one.rank for one in circle(waiting_forever(table))] == [0, 2, 4]


FORK = Layout(
    (Stage(0, "root", (0,), ()), Stage(1, "a", (1,), (0,)), Stage(2, "b", (1,), (0,)), Stage(3, "join", (0,), (1, 2)))
)


def test_several_neighbours_on_one_rank_are_told_apart():
    table = plan("one_f_one_b", FORK, 3)
    assert validate(table) == []
    texts = [[str(action) for action in row] for row in table.ranks]
    assert "SEND_F s0 m0 ->1/s1" in texts[0] and "SEND_F s0 m0 ->1/s2" in texts[0]
    assert "RECV_F s3 m0 <-1/s1" in texts[0] and "RECV_F s1 m0 <-0" in texts[1]

    silent = changed(0, replaced("SEND_F s0 m1 ->1/s2", "SEND_F s0 m1 ->1"), table)
    message = next(violation.message for violation in validate(silent) if violation.check == "peer")
    assert "rank 1 holds stages 1 and 2; write which is meant, for example SEND_F s0 m1 ->1/s1" in message

    wrong = changed(0, replaced("SEND_F s0 m1 ->1/s2", "SEND_F s0 m1 ->1/s3"), table)
    assert any(
        violation.check == "peer" and "rank 1 holds no stage" in violation.message for violation in validate(wrong)
    )

    twice_the_same = changed(0, replaced("SEND_F s0 m1 ->1/s2", "SEND_F s0 m1 ->1/s1"), table)
    assert {"twice", "left over", "unmatched"} <= {violation.check for violation in validate(twice_the_same)}

    mixed_up = changed(1, swapped("RECV_F s1 m1 <-0", "RECV_F s2 m1 <-0"), table)
    assert {"fifo"} <= {violation.check for violation in validate(mixed_up)}


def test_more_than_a_rank_may_hold():
    table = plan("gpipe", Layout.u(3), 4)
    assert validate(table, problem=Problem(Layout.u(3), 4, memory_cap=(8, 4, 4))) == []
    problem = Problem(Layout.u(3), 4, Costs(memory=(1.0, 2.5, 1.0, 1.0)), (None, 7.0, 3.0))
    first, second = only(validate(table, problem=problem), "memory")
    assert (first.rank, first.action) == (1, "F s1 m2")
    assert first.message == "holds 7.5 of memory here, but the rank may hold 7"
    assert (second.rank, second.action) == (2, "F s2 m3")
    assert second.message == "holds 4 of memory here, but the rank may hold 3"
    with pytest.raises(ScheduleError, match=r"2 things are wrong with this table:\nrank 1, action \d+ \(F s1 m2\)"):
        check(table, problem)


def test_what_stays_between_the_two_halves_of_a_backward_counts():
    table = table_of(
        PAIR,
        2,
        "F s0 m0, SEND_F s0 m0 ->1, F s0 m1, SEND_F s0 m1 ->1, RECV_B s0 m0 <-1, I s0 m0, RECV_B s0 m1 <-1, I s0 m1, "
        "W s0 m0, W s0 m1",
        "RECV_F s1 m0 <-0, F s1 m0, I s1 m0, SEND_B s1 m0 ->0, RECV_F s1 m1 <-0, F s1 m1, I s1 m1, SEND_B s1 m1 ->0, "
        "W s1 m0, W s1 m1",
    )

    def found(kept, cap):
        return validate(table, problem=Problem(PAIR, 2, Costs(memory=4.0, memory_w=kept), (None, cap)))

    assert found(1.0, 5.0) == [] and found(0.0, 4.0) == []
    assert only(found(1.0, 4.5), "memory")[0].action == "F s1 m1"
    assert only(found(None, 7.0), "memory")[0].message.startswith("holds 8 of memory")


def test_an_evaluation_keeps_nothing():
    table = plan("gpipe", Layout.u(3), 4, forward_only=True)
    assert validate(table, problem=Problem(Layout.u(3), 4, memory_cap=(2, 1, 1))) == []


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (Problem(Layout.u(4), 4), "the table has 4 stages on 3 ranks, the problem 5 on 4"),
        (Problem(Layout.u(3), 5), "the table has 4 microbatches, the problem 5"),
        (Problem(Layout.laps(3), 4), "the table has 4 stages on 3 ranks, the problem 7 on 3"),
        (
            Problem(
                Layout(tuple(Stage(s, f"s{s}", (s % 3,), (0,) if s else ()) for s in range(4))),
                4,
            ),
            "connected differently",
        ),
        (Problem(Layout(Layout.u(3).stages, 4), 4), "4 stages on 3 ranks, the problem 4 on 4"),
    ],
)
def test_a_table_for_another_problem_is_refused(problem, said):
    with pytest.raises(ScheduleError) as caught:
        validate(GOOD, problem=problem)
    assert said in str(caught.value)
    with pytest.raises(ScheduleError):
        check(GOOD, problem)


def test_microbatches_of_other_domains_are_another_problem():
    layout = Layout.u(2, domains=2)
    table = plan("ldt_1f1b", layout, 4)
    assert validate(table, problem=Problem(layout, 4)) == []
    other = Problem(Layout(layout.stages, layout.num_ranks, (1, 0, 1, 0)), 4)
    with pytest.raises(ScheduleError, match="domain"):
        validate(table, problem=other)


def test_what_runs_under_one_kind_of_messages_runs_under_the_weaker_ones():
    """Receives moved to any place before their use: the order that the message of a deadlock relies on. Each kind differs
    from the next for some table, or a check of it could not fail."""
    rng = random.Random(5)
    roots = Layout.roots({"a": 0, "b": 1, "c": 2}, {"join": 3, "middle": 4, "last": 5})
    seen = set()
    for number in range(400):
        layout = (Layout.u(3), Layout.laps(2, 2), roots)[number % 3]
        table = plan(rng.choice(("gpipe", "one_f_one_b")), layout, rng.randint(2, 5))
        rows = [list(row) for row in table.ranks]
        if number % 2:
            rows = [list(row) for row in lower(layout, table.num_microbatches, table.compute_order(), prefetch=0).ranks]
        for _ in range(rng.randint(0, 2)):
            row = rng.choice(rows)
            place = rng.choice([i for i, action in enumerate(row) if action.kind.is_recv])
            row.insert(rng.randint(0, place), row.pop(place))
        moved = ScheduleTable.from_rows(layout, table.num_microbatches, rows)
        runs = tuple(not waiting_forever(moved, semantics) for semantics in Semantics)
        assert list(runs) == sorted(runs, reverse=True), moved
        seen.add(sum(runs))
    assert seen == {1, 2, 3}, seen
