"""The simulator against another one that is as simple as can be, against the formulas of the books, and by hand."""

from __future__ import annotations

import math
import random

import pytest

from ldt_schedules.planning import PLANNERS, Action, Costs, Kind, Layout, ScheduleError, Stage, simulate
from ldt_schedules.planning.costs import Link
from ldt_schedules.planning.lowering import lower
from ldt_schedules.planning.memory import peak_memory
from ldt_schedules.planning.problem import Problem
from tests.planning.random_problems import (
    name_of,
    needs,
    random_costs,
    random_layout,
    random_order,
    same,
    with_domain_of,
)

PAIR = Layout((Stage(0, "first", (0,), ()), Stage(1, "last", (1,), (0,))))


def chain(ranks):
    return Layout(tuple(Stage(s, f"s{s}", (s,), (s - 1,) if s else ()) for s in range(ranks)))


def acts(texts):
    return tuple(Action.parse(text) for text in texts.split(", "))


def naive_starts(layout, rows, costs):
    """Start times as a fixpoint: begin with 0 everywhere and push what is too early, until nothing is."""
    length = {action: costs.time(action.kind, action.stage, action.microbatches[0]) for row in rows for action in row}
    where = {action: rank for rank, row in enumerate(rows) for action in row}
    named = {(name_of(action), action.microbatches[0]): action for action in length}
    start = dict.fromkeys(length, 0.0)
    changed = True
    while changed:
        changed = False
        for row in rows:
            for i, action in enumerate(row):
                least = start[row[i - 1]] + length[row[i - 1]] if i else 0.0
                for need in needs(layout, action):
                    source = named[need, action.microbatches[0]]
                    latency = costs.link(where[source], where[action]).latency if where[source] != where[action] else 0
                    least = max(least, start[source] + length[source] + latency)
                if least > start[action]:
                    start[action], changed = least, True
    return start


def naive_play(layout, rows, costs):
    """Start times, transfers and exposed times with wires: again and again the computation that ends next.

    It is the one with the earliest end of those whose inputs have all been sent: what is still to be sent will be sent
    when something ends, and so later.
    """
    position, free = [0] * len(rows), [0.0] * len(rows)
    arrived, made, wire_free = {}, {}, {}
    starts, transfers, exposed = {}, [], [0.0] * len(rows)
    for _ in range(sum(map(len, rows))):
        candidates = []
        for rank, row in enumerate(rows):
            if position[rank] < len(row):
                action = row[position[rank]]
                (m,) = action.microbatches
                inputs = [(need, name_of(action), m) for need in needs(layout, action)]
                if all(key in arrived for key in inputs):
                    begin = max([free[rank], *(arrived[key] for key in inputs)])
                    ready = max([free[rank], *(made[key] for key in inputs)])
                    candidates.append((begin + costs.time(action.kind, action.stage, m), rank, begin, begin - ready))
        end, rank, begin, waited = min(candidates)
        action = rows[rank][position[rank]]
        (m,) = action.microbatches
        position[rank], free[rank], starts[action] = position[rank] + 1, end, begin
        exposed[rank] += waited
        forward = action.kind is Kind.F
        targets = []
        if forward:
            targets = [("F", s.index) for s in layout.stages if action.stage in s.inputs] + [("BI", action.stage)]
        elif action.kind in (Kind.B, Kind.I):
            targets = [("BI", s) for s in layout.stages[action.stage].inputs] + [("W", action.stage)]
        for target in targets:
            key = (name_of(action), target, m)
            peer = layout.rank_of(target[1], m)
            made[key] = arrived[key] = end
            if peer != rank:
                link = costs.link(rank, peer)
                edge = (action.stage, target[1]) if forward else (target[1], action.stage)
                wire = link.resource or (rank, peer)
                on = max(end, wire_free.get(wire, 0.0))
                wire_free[wire] = on + (0 if link.bandwidth is None else costs.size(*edge, forward) / link.bandwidth)
                arrived[key] = wire_free[wire] + link.latency
                transfers.append((rank, peer, m, on, wire_free[wire], arrived[key]))
    return starts, transfers, exposed


def case(seed, wires):
    rng = random.Random(f"{seed} {wires}")
    microbatches = rng.randint(1, 6)
    layout = with_domain_of(rng, random_layout(rng), microbatches)
    return layout, random_order(rng, layout, microbatches), random_costs(rng, layout, microbatches, wires), microbatches


@pytest.mark.parametrize("seed", range(200))
def test_without_wires_starts_are_the_least_fixpoint(seed):
    layout, rows, costs, microbatches = case(seed, wires=False)
    timeline = simulate(layout, rows, costs)
    expected = naive_starts(layout, rows, costs)
    assert len(timeline.spans) == len(expected)
    for span in timeline.spans:
        assert same(span.start, expected[span.action]), str(span.action)
        assert same(span.end, span.start + costs.duration(span.action))
    table = lower(layout, microbatches, rows, timeline=timeline)
    assert table.compute_order() == rows
    assert same(simulate(layout, table.ranks, costs).makespan, timeline.makespan)


@pytest.mark.parametrize("seed", range(200))
def test_messages_queue_for_wires_in_the_order_of_their_making(seed):
    layout, rows, costs, _ = case(seed, wires=True)
    timeline = simulate(layout, rows, costs)
    starts, transfers, exposed = naive_play(layout, rows, costs)
    for span in timeline.spans:
        assert same(span.start, starts[span.action]), str(span.action)
    assert len(timeline.transfers) == len(transfers)
    mine = sorted((t.sender, t.receiver, t.microbatch, t.start, t.sent, t.arrived) for t in timeline.transfers)
    for one, other in zip(mine, sorted(transfers), strict=True):
        assert one[:3] == other[:3] and all(map(same, one[3:], other[3:]))
    assert all(map(same, timeline.exposed, exposed))


@pytest.mark.parametrize("seed", range(100))
def test_peak_memory_is_what_is_held_when_some_forward_starts(seed):
    layout, rows, costs, _ = case(seed, wires=False)
    timeline = simulate(layout, rows, costs)
    peaks = peak_memory(timeline, costs)
    for rank, row in enumerate(timeline.rows):
        spans = {(name_of(span.action), span.action.microbatches[0]): span for span in row}
        peak = 0.0
        for now in (span.start for span in row if span.action.kind is Kind.F):
            held = 0.0
            for (what, m), span in spans.items():
                if what[0] == "F" and span.start <= now:
                    back, last = spans[("BI", what[1]), m], spans.get((("W", what[1]), m))
                    if back.end > now:
                        held += costs.held(what[1])
                    elif last is not None and last.end > now:
                        held += costs.held_after_input_grad(what[1])
            peak = max(peak, held)
        assert same(peaks[rank], peak)


@pytest.mark.parametrize("ranks", range(1, 7))
@pytest.mark.parametrize("microbatches", [1, 3, 8, 20])
def test_the_bubble_of_gpipe_and_of_1f1b_is_that_of_the_books(ranks, microbatches):
    """(P - 1) / (M + P - 1) for both; 1F1B needs P - r activations on rank r for it, GPipe all M."""
    problem = Problem(chain(ranks), microbatches)
    for name in ("gpipe", "one_f_one_b"):
        timeline = simulate(problem.layout, PLANNERS[name](problem))
        assert timeline.makespan == 3 * (microbatches + ranks - 1)
        assert timeline.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
        expected = [microbatches if name == "gpipe" else min(ranks - r, microbatches) for r in range(ranks)]
        assert list(timeline.peak_in_flight) == expected


def zero_bubble_h1(ranks, microbatches):
    """ZB-H1 of Qi et al. (arXiv:2401.10241): 1F1B with input gradients, W put off by r microbatches on rank r."""
    rows = []
    for rank in range(ranks):
        row = [f"F s{rank} m{m}" for m in range(ranks - rank)]
        for m in range(microbatches):
            row.append(f"I s{rank} m{m}")
            if m >= rank:
                row.append(f"W s{rank} m{m - rank}")
            if m + ranks - rank < microbatches:
                row.append(f"F s{rank} m{m + ranks - rank}")
        row += [f"W s{rank} m{m}" for m in range(microbatches - rank, microbatches)]
        rows.append(acts(", ".join(row)))
    return rows


@pytest.mark.parametrize("ranks", range(2, 7))
@pytest.mark.parametrize("rounds", [2, 3])
def test_the_bubble_of_zb_h1_is_a_third_of_that_of_1f1b(ranks, rounds):
    microbatches = rounds * ranks
    split = simulate(chain(ranks), zero_bubble_h1(ranks, microbatches))
    whole = simulate(chain(ranks), PLANNERS["one_f_one_b"](Problem(chain(ranks), microbatches)))
    idle = [timeline.makespan - 3 * microbatches for timeline in (split, whole)]
    assert idle == [ranks - 1, 3 * (ranks - 1)]
    assert set(split.peak_in_flight) == {ranks}  # on every rank what 1F1B has on the first


def test_a_wire_carries_one_message_after_the_other():
    """Three activations of 2 on the wire and 1 on the way: there at 4, 6, 8."""
    rows = acts("F s0 m0, F s0 m1, F s0 m2"), acts("F s1 m0, F s1 m1, F s1 m2")
    link = Link(latency=1.0, bandwidth=0.5)
    timeline = simulate(PAIR, rows, Costs(links=((0, 1, link),)))
    assert [(t.start, t.sent, t.arrived) for t in timeline.transfers] == [(1, 3, 4), (3, 5, 6), (5, 7, 8)]
    assert [span.start for span in timeline.rows[1]] == [4, 6, 8]
    assert [(t.kind, t.stage, t.microbatch) for t in timeline.transfers] == [(Kind.SEND_F, 0, m) for m in range(3)]


@pytest.mark.parametrize(("resource", "starts"), [(None, (1.0, 1.0)), ("uplink", (1.0, 3.0))])
def test_links_of_one_resource_share_one_wire(resource, starts):
    """Rank 0 feeds ranks 1 and 2; each message is on its wire for 2."""
    layout = Layout((Stage(0, "a", (0,), ()), Stage(1, "b", (1,), (0,)), Stage(2, "c", (2,), (0,))))
    links = tuple((0, peer, Link(0.0, 0.5, resource)) for peer in (1, 2))
    timeline = simulate(layout, (acts("F s0 m0"), acts("F s1 m0"), acts("F s2 m0")), Costs(links=links))
    assert tuple(t.start for t in timeline.transfers) == starts
    assert [row[0].start for row in timeline.rows] == [0.0, starts[0] + 2, starts[1] + 2]


def test_the_two_directions_of_a_link_do_not_wait_for_each_other():
    rows = acts("F s0 m0, F s0 m1, B s0 m0, B s0 m1"), acts("F s1 m0, B s1 m0, F s1 m1, B s1 m1")
    timeline = simulate(PAIR, rows, Costs(bandwidth=0.25))
    up = [(t.start, t.sent) for t in timeline.transfers if t.kind is Kind.SEND_F]
    down = [(t.start, t.sent) for t in timeline.transfers if t.kind is Kind.SEND_B]
    assert up == [(1, 5), (5, 9)]
    assert down == [(8, 12), (12, 16)]


def test_exposed_time_is_what_no_computation_hides():
    """Latency 5. Rank 1: m0 is made at 1 and there at 6: 5 exposed; m1 is made at 2, there at 7, but m0 runs till 9.
    Rank 0: idle from 2 on, the gradient of m0 is made at 9 and there at 14; that of m1 is made at 12, there at 17, when
    B of m0 (14 to 16) has ended for 1."""
    rows = acts("F s0 m0, F s0 m1, B s0 m0, B s0 m1"), acts("F s1 m0, B s1 m0, F s1 m1, B s1 m1")
    timeline = simulate(PAIR, rows, Costs(latency=5))
    assert [span.start for span in timeline.rows[0]] == [0, 1, 14, 17]
    assert [span.start for span in timeline.rows[1]] == [6, 7, 9, 10]
    assert timeline.exposed == (5 + 1, 5)
    assert timeline.makespan == 19


def test_waiting_for_what_is_not_made_yet_is_not_exposed():
    rows = acts("F s0 m0, B s0 m0"), acts("F s1 m0, B s1 m0")
    assert simulate(PAIR, rows).exposed == (0, 0)
    assert simulate(PAIR, rows, Costs(latency=2)).exposed == (2, 2)


def test_a_packed_action_waits_for_all_its_microbatches_and_takes_as_long_as_they_do():
    rows = acts("F s0 m0, F s0 m1, B s0 m(0,1)"), acts("F s1 m(0,1), B s1 m(1,0)")
    timeline = simulate(PAIR, rows, Costs(forward=((1.0, 3.0), (0.5, 2.0)), latency=1))
    assert [(span.start, span.end) for span in timeline.rows[1]] == [(5, 7.5), (7.5, 11.5)]
    assert (timeline.rows[0][2].start, timeline.makespan) == (12.5, 16.5)
    assert timeline.peak_in_flight == (2, 2)
    assert peak_memory(timeline, Costs(memory=(1.5, 4.0))) == (3.0, 8.0)


def test_a_rank_without_work_and_an_empty_step():
    layout = Layout(PAIR.stages, 3)
    timeline = simulate(layout, (acts("F s0 m0"), acts("F s1 m0"), ()))
    assert timeline.busy(2) == 0 and timeline.bubble_of(2) == 1
    assert simulate(layout, ((), (), ())).makespan == 0


def test_an_order_that_cannot_go_on_names_everybody_who_waits():
    rows = acts("B s0 m0, F s0 m0"), acts("F s1 m0, B s1 m0")
    with pytest.raises(ScheduleError) as caught:
        simulate(PAIR, rows)
    message = str(caught.value)
    assert "rank 0 waits at B s0 m0 for saved activations of s0 m0, output gradient of s0 m0 from s1" in message
    assert "rank 1 waits at F s1 m0 for input of s1 m0 from s0" in message


def test_rows_and_costs_must_fit_the_layout():
    with pytest.raises(ScheduleError, match="has 2 pipeline ranks, the order has 1 rows"):
        simulate(PAIR, (acts("F s0 m0"),))
    with pytest.raises(ScheduleError, match="forward gives 3 numbers, but the layout has 2 stages"):
        simulate(PAIR, ((), ()), Costs(forward=(1.0, 1.0, 1.0)))


def test_equal_input_gives_equal_output():
    for seed in range(20):
        layout, rows, costs, _ = case(seed, wires=True)
        assert simulate(layout, rows, costs) == simulate(layout, rows, costs)


def test_actions_of_no_length_keep_their_order():
    costs = Costs(forward=0.0, backward=0.0, input_grad=0.0, weight_grad=0.0)
    for seed in range(20):
        layout, rows, _, microbatches = case(seed, wires=False)
        timeline = simulate(layout, rows, costs)
        assert tuple(tuple(span.action for span in row) for row in timeline.rows) == rows
        assert timeline.makespan == 0 and not math.isnan(timeline.bubble)
        assert lower(layout, microbatches, rows, timeline=timeline).compute_order() == rows
