"""Every small table of every planner, and properties of larger ones."""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldt_schedules.planning import (
    PLANNERS,
    Costs,
    Layout,
    ScheduleError,
    plan,
    read_table,
    simulate,
    validate,
    write_table,
)
from ldt_schedules.planning.lowering import lower
from ldt_schedules.planning.planners.ldt_1f1b import turnarounds
from ldt_schedules.planning.progress import waiting_forever

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
SMALL = [(p, m) for p in range(2, 7) for m in range(1, 11)]


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("forward_only", [False, True])
def test_every_small_table(name, forward_only):
    """Valid, complete, no rank waits for ever, and the formats keep it."""
    for ranks, microbatches in SMALL:
        table = plan(name, Layout.u(ranks), microbatches, forward_only=forward_only)
        assert validate(table) == [], (ranks, microbatches)
        per_stage = 1 if forward_only else 2
        assert sum(map(len, table.compute_order())) == (ranks + 1) * microbatches * per_stage
        for format_name in ("json", "grid"):
            assert read_table(write_table(table, format_name)) == table, (ranks, microbatches, format_name)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 20), st.integers(1, 60), st.sampled_from(sorted(PLANNERS)), st.booleans(), st.integers(0, 4))
def test_larger_tables(ranks, microbatches, name, forward_only, prefetch):
    layout = Layout.u(ranks)
    planned = plan(name, layout, microbatches, forward_only=forward_only)
    table = lower(layout, microbatches, planned.compute_order(), forward_only, prefetch)
    assert validate(table) == []
    assert list(waiting_forever(table)) == []
    assert read_table(write_table(table, "json")) == table
    assert read_table(write_table(table, "grid")) == table


@pytest.mark.parametrize("name", PLANNERS)
def test_without_prefetch_even_blocking_communication_gets_through(name):
    for ranks, microbatches in SMALL:
        layout = Layout.u(ranks)
        table = lower(layout, microbatches, PLANNERS[name](layout, microbatches), prefetch=0)
        assert validate(table, blocking=True) == [], (ranks, microbatches)


def test_a_prefetched_receive_is_posted_one_computation_earlier():
    layout = Layout.u(2)
    order = PLANNERS["gpipe"](layout, 3)
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


@pytest.mark.parametrize(("name", "ranks", "microbatches"), [("ldt_1f1b", 3, 4), ("gpipe", 2, 2), ("ldt_1f1b", 4, 2)])
def test_golden_tables(name, ranks, microbatches, update_golden):
    """Reviewed by eye once; `pytest --update-golden` rewrites them."""
    text = write_table(plan(name, Layout.u(ranks), microbatches), "grid")
    file = GOLDEN / f"{name}_p{ranks}_m{microbatches}.txt"
    if update_golden:
        file.write_text(text)
    assert text == file.read_text()
