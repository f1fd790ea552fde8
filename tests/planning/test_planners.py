"""Every small table of every planner, and properties of larger ones."""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldt_schedules.planning import (
    PLANNERS,
    Costs,
    Kind,
    Layout,
    ScheduleError,
    Stage,
    plan,
    read_table,
    simulate,
    validate,
    write_table,
)
from ldt_schedules.planning.formats import grid
from ldt_schedules.planning.lowering import lower
from ldt_schedules.planning.planners.ldt_1f1b import turnarounds
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.progress import Semantics, waiting_forever

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
SMALL = [(p, m) for p in range(2, 7) for m in range(1, 11)]
SWEPT = [name for name in PLANNERS if name != "exact"]
"""Exact plans have their own tests: a search for each of so many tables would take hours."""


def layout_for(name, ranks):
    """A U that the planner knows."""
    return Layout.laps(ranks) if name == "ldt_2lap_1f1b" else Layout.u(ranks)


def order_for(name, layout, microbatches):
    return PLANNERS[name](Problem(layout, microbatches))


@pytest.mark.parametrize("name", SWEPT)
@pytest.mark.parametrize("forward_only", [False, True])
def test_every_small_table(name, forward_only):
    """Valid, complete, no rank waits for ever, and the formats keep it."""
    for ranks, microbatches in SMALL:
        layout = layout_for(name, ranks)
        table = plan(name, layout, microbatches, forward_only=forward_only)
        assert validate(table) == [], (ranks, microbatches)
        per_stage = 1 if forward_only else 3 if name == "auto_zb" else 2
        assert sum(map(len, table.compute_order())) == len(layout.stages) * microbatches * per_stage
        assert read_table(write_table(table, "json")) == table, (ranks, microbatches)
        assert grid.loads(write_table(table, "grid"), layout) == table, (ranks, microbatches)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 20),
    st.integers(1, 60),
    st.sampled_from(sorted({*SWEPT} - {"auto", "auto_zb"})),
    st.booleans(),
    st.integers(0, 4),
)
def test_larger_tables(ranks, microbatches, name, forward_only, prefetch):
    layout = layout_for(name, ranks)
    planned = plan(name, layout, microbatches, forward_only=forward_only)
    table = lower(layout, microbatches, planned.compute_order(), forward_only, prefetch)
    assert validate(table) == []
    assert list(waiting_forever(table)) == []
    assert read_table(write_table(table, "json")) == table
    assert grid.loads(write_table(table, "grid"), layout) == table


@pytest.mark.parametrize("name", SWEPT)
def test_without_prefetch_even_blocking_communication_gets_through(name):
    for ranks, microbatches in SMALL:
        layout = layout_for(name, ranks)
        table = lower(layout, microbatches, order_for(name, layout, microbatches), prefetch=0)
        assert validate(table, Semantics.BLOCKING) == [], (ranks, microbatches)


def test_a_prefetched_receive_is_posted_one_computation_earlier():
    layout = Layout.u(2)
    order = order_for("gpipe", layout, 3)
    late, early = (lower(layout, 3, order, prefetch=n).ranks[1] for n in (0, 1))
    position = [[str(a) for a in row].index("RECV_F s1 m2 <-0") for row in (late, early)]
    assert position[1] < position[0]


def test_k_is_that_of_the_published_code():
    """D12: upstream's documentation gives another K (2: 2, 4: 3, …), and few microbatches raise IndexError there."""
    assert {p: turnarounds(p, 99) for p in range(2, 9)} == {2: 1, 3: 2, 4: 2, 5: 3, 6: 4, 7: 4, 8: 5}
    for p in range(2, 100):
        assert turnarounds(p, 10**6) == int((4 * p + 1) / 6 + 1e-5)


def test_the_published_rule_written_out():
    """P = 4, M = 5: K = 2."""
    edge, first, *_, last = plan("ldt_1f1b", Layout.u(4), 5).compute_order()
    names = {"F s0": "FS", "F s4": "FE", "B s4": "BS", "B s0": "BE"}
    said = " ".join(names[str(a).rpartition(" ")[0]] + str(a.microbatches[0]) for a in edge)
    assert said == ("FS0 FS1 FS2 FS3 FE0 BS0 FE1 BS1 FS4 FE2 BS2 BE0 FE3 BS3 BE1 FE4 BS4 BE2 BE3 BE4")
    assert [str(a.kind) + str(a.microbatches[0]) for a in first] == [
        "F0",
        "F1",
        "F2",
        "F3",
        "B0",
        "F4",
        "B1",
        "B2",
        "B3",
        "B4",
    ]
    assert [str(a.kind) + str(a.microbatches[0]) for a in last] == [
        "F0",
        "F1",
        "B0",
        "F2",
        "B1",
        "F3",
        "B2",
        "F4",
        "B3",
        "B4",
    ]


def turn_order(row):
    return " ".join(f"{action.kind}{action.stage}.{action.microbatches[0]}" for action in row)


def test_the_published_two_lap_rule_written_out():
    """P = 2, M = 3: K = 1, two forwards of V first, then n = 2 rounds on the edge and 1 on the cloud."""
    edge, cloud = plan("ldt_2lap_1f1b", Layout.laps(2), 3).compute_order()
    assert turn_order(edge) == (
        "F0.0 F0.1 "  # F of V
        "F2.0 F0.2 F2.1 "  # F of L; with i >= K - 1 = 0 also F of V
        "F4.0 B4.0 "  # K turnarounds
        "F2.2 F4.1 B4.1 B2.0 "  # F of L, T if left, B of L; B of V only from i = K
        "F4.2 B4.2 B2.1 B0.0 "
        "B2.2 B0.1 "
        "B0.2"
    )
    assert turn_order(cloud) == "F1.0 F1.1 F3.0 F1.2 F3.1 B3.0 F3.2 B3.1 B1.0 B3.2 B1.1 B1.2"


def test_one_f_one_b_on_a_chain_is_that_of_the_books():
    chain = Layout(tuple(Stage(s, f"s{s}", (s,), (s - 1,) if s else ()) for s in range(3)))
    rows = order_for("one_f_one_b", chain, 4)
    assert turn_order(rows[0]) == "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3"
    assert turn_order(rows[1]) == "F1.0 F1.1 B1.0 F1.2 B1.1 F1.3 B1.2 B1.3"
    assert turn_order(rows[2]) == "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2 F2.3 B2.3"


def test_an_evaluation_runs_the_forwards_of_the_training_order():
    for name in SWEPT:
        layout = layout_for(name, 3)
        training, evaluation = (plan(name, layout, 5, forward_only=only).compute_order() for only in (False, True))
        assert evaluation == tuple(tuple(a for a in row if a.kind is Kind.F) for row in training)


def test_a_planner_for_rings_refuses_other_layouts():
    with pytest.raises(ScheduleError, match="ldt_1f1b order is defined for a U; plan another layout with"):
        plan("ldt_1f1b", Layout.laps(3), 2)
    with pytest.raises(ScheduleError, match="defined for a U of 2 laps"):
        plan("ldt_2lap_1f1b", Layout.u(3), 2)


def test_memory_is_what_1f1b_promises():
    for ranks, microbatches in SMALL:
        layout = Layout.u(ranks)
        peaks = simulate(layout, plan("ldt_1f1b", layout, microbatches).ranks).peak_in_flight
        for rank in range(1, ranks):
            assert peaks[rank] <= min(ranks - rank + 1, microbatches)
        assert simulate(layout, plan("gpipe", layout, microbatches).ranks).peak_in_flight[1] == microbatches


def test_latency_makes_a_step_longer_by_what_it_must():
    """One microbatch crosses the edge's links four times."""
    layout = Layout.u(3)
    table = plan("ldt_1f1b", layout, 1)
    plain, far = (simulate(layout, table.ranks, Costs(latency=latency)).makespan for latency in (0, 10))
    assert (plain, far) == (12, 52)


def test_misspelt_and_impossible_requests():
    with pytest.raises(ScheduleError, match="did you mean ldt_1f1b"):
        plan("ldt_1fb1", Layout.u(2), 1)
    with pytest.raises(ScheduleError, match="at least 1 microbatch, got 0"):
        plan("gpipe", Layout.u(2), 0)


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [("ldt_1f1b", 3, 4), ("gpipe", 2, 2), ("ldt_1f1b", 4, 2), ("ldt_2lap_1f1b", 2, 3), ("auto_zb", 3, 3)],
)
def test_golden_tables(name, ranks, microbatches, update_golden):
    """Reviewed by eye once; `pytest --update-golden` rewrites them."""
    text = write_table(plan(name, layout_for(name, ranks), microbatches), "grid")
    file = GOLDEN / f"{name}_p{ranks}_m{microbatches}.txt"
    if update_golden:
        file.write_text(text)
    assert text == file.read_text()
