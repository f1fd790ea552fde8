"""Traces: what is written is read back, and what is broken is told with its place."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ldt_schedules.planning import Costs, Layout, ScheduleError, plan, simulate
from ldt_schedules.planning.formats.trace_json import Trace, dumps, is_trace, loads


def trace_of(layout, num_microbatches, planner="ldt_1f1b", unit="s", **costs):
    table = plan(planner, layout, num_microbatches)
    return Trace(layout, num_microbatches, simulate(layout, table.ranks, Costs(**costs)), unit)


@pytest.mark.parametrize(
    "trace",
    [
        trace_of(Layout.u(3), 4, latency=0.1, bandwidth=3.0),
        trace_of(Layout.u(3, domains=2), 5, unit="forwards"),
        trace_of(Layout.laps(3), 4, planner="auto_zb", latency=1 / 3),
        trace_of(replace(Layout.u(3, domains=2), num_ranks=6, domain_of=(0, 0, 1, 0)), 4, planner="gpipe"),
    ],
    ids=["u", "domains", "laps and I/W", "idle rank, domains out of turn"],
)
def test_what_is_written_is_read_back(trace):
    assert trace.timeline.transfers and len(trace.timeline.exposed) == trace.layout.num_ranks
    assert loads(dumps(trace)) == trace
    assert dumps(loads(dumps(trace))) == dumps(trace)


def test_a_measured_trace_may_lack_messages_and_stand_in_any_order():
    trace = trace_of(Layout.u(3), 4)
    content = json.loads(dumps(trace))
    content["spans"].reverse()
    content["transfers"] = []
    del content["exposed"]
    read = loads(json.dumps(content))
    assert read.timeline.rows == trace.timeline.rows
    assert read.timeline.transfers == () and read.timeline.exposed == ()


def test_a_trace_is_known_by_its_format():
    assert is_trace(dumps(trace_of(Layout.u(2), 1))) and is_trace('{"format": "ldt-trace/9"}')
    assert not is_trace('{"format": "ldt-table/1"}') and not is_trace("Rank 0") and not is_trace("{")


def broken(key, value):
    """The trace with `content[key]` replaced, or (a tuple) an entry of an entry of it."""

    def change(content):
        if isinstance(key, tuple):
            name, row, column = key
            content[name][row][column] = value
        else:
            content[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken("format", "ldt-trace/2"), 'expected "ldt-trace/1"'),
        (broken("color", 1), "unknown key 'color'; a trace has format, unit"),
        (lambda content: content.pop("unit"), '"unit" is missing'),
        (broken("unit", 3), '"unit" is 3; expected a text'),
        (broken("num_microbatches", 0), "at least 1 microbatch, got 0"),
        (broken("num_microbatches", 1), "no microbatch 0..0"),
        (broken("num_ranks", "3"), "\"num_ranks\" is '3'; expected a whole number"),
        (broken("domain_of", 3), '"domain_of" is 3; expected a list'),
        (broken("domain_of", ["0"]), '"domain_of" must be a list with a whole number'),
        (broken("exposed", [0.0]), "does not have the pipeline ranks 0..2"),
        (broken("exposed", [0.0, "x", 0]), "the exposed time of rank 1 is 'x'"),
        (broken(("stages", 0, "rank"), 7), "pipeline ranks must be"),
        (broken(("spans", 1, 0), 2), "span 1: F s0 m1 is done on rank 0, not on rank 2"),
        (broken(("spans", 1, 0), "0"), "span 1: the rank is '0'"),
        (broken(("spans", 0, 1), "F s9 m0"), "span 0: F s9 m0 is of no stage 0..3"),
        (broken(("spans", 0, 1), "G s0 m0"), "span 0: cannot read action 'G s0 m0'"),
        (broken(("spans", 0, 1), 5), "span 0: cannot read action '5'"),
        (broken(("spans", 0, 1), "SEND_F s0 m0 ->1"), "SEND_F s0 m0 ->1 computes nothing"),
        (broken(("spans", 0, 2), -1), "span 0: start is -1; expected a time of 0 or more"),
        (broken(("spans", 0, 2), 99), "ends before it starts: 99, 1"),
        (broken(("spans", 0, 3), float("nan")), "span 0: end is nan"),
        (broken(("spans", 0, 3), 10**400), "expected a time"),
        (broken(("transfers", 0, 1), 2), "SEND_F s0 m0 ->1 is no SEND of one microbatch to rank 2"),
        (broken(("transfers", 0, 2), "RECV_F s1 m0 <-0"), "transfer 0: RECV_F s1 m0 <-0 is no SEND"),
        (broken(("transfers", 0, 2), "SEND_F s0 m(0,1) ->1"), "no SEND of one microbatch"),
        (broken(("transfers", 0, 4), 0), "ends before it starts"),
        (lambda content: content["spans"][0].pop(), "span 0: expected [rank, computation, start, end], got [0"),
    ],
)
def test_a_broken_trace_is_told_with_its_place(change, message):
    content = json.loads(dumps(trace_of(Layout.u(3), 2, latency=1)))
    change(content)
    with pytest.raises(ScheduleError) as told:
        loads(json.dumps(content))
    assert message in str(told.value)


def test_a_file_that_is_cut_off():
    text = dumps(trace_of(Layout.u(3), 2))
    for length in range(1, len(text) - 2, 97):
        with pytest.raises(ScheduleError):
            loads(text[:length])
