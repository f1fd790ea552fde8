"""Trace events: what ui.perfetto.dev shows is what the timeline says."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from ldt_schedules.planning import Costs, Kind, Layout, plan, simulate
from ldt_schedules.planning.formats.trace_json import Trace
from ldt_schedules.planning.timeline import Timeline, Transfer
from ldt_schedules.rendering.panel import Panel
from ldt_schedules.rendering.perfetto import perfetto_json


def panel(layout, microbatches, planner="ldt_1f1b", unit="forwards", **costs):
    table = plan(planner, layout, microbatches)
    return Panel(planner, Trace(layout, microbatches, simulate(layout, table.ranks, Costs(**costs)), unit))


def events_of(*panels):
    return json.loads(perfetto_json(panels))["traceEvents"]


def tracks(events):
    """(process, track) -> the slices on it."""
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[processes[event["pid"]], names[event["pid"], event["tid"]]].append(event)
    return found


CASES = [
    (Layout.u(4), 8, "ldt_1f1b", {"latency": 2.0, "bandwidth": 0.7}),
    (Layout.u(3, domains=2), 6, "gpipe", {"latency": 1.0}),
    (Layout.laps(3), 4, "auto_zb", {"latency": 1.0, "bandwidth": 2.0}),
]


@pytest.mark.parametrize(("unit", "scale"), [("s", 1e6), ("forwards", 1e3)])
@pytest.mark.parametrize(("layout", "microbatches", "planner", "costs"), CASES)
def test_the_slices_of_a_rank_are_its_busy_time(layout, microbatches, planner, costs, unit, scale):
    shown = panel(layout, microbatches, planner, unit, **costs)
    found = tracks(events_of(shown))
    for rank in range(layout.num_ranks):
        track = ("cloud", f"cloud {rank}") if rank else ("edge", "edge")
        assert sum(e["dur"] for e in found[track]) == pytest.approx(shown.trace.timeline.busy(rank) * scale)
        assert [e["name"] for e in found[track]] == [str(span.action) for span in shown.trace.timeline.rows[rank]]
    assert len([e for track, slices in found.items() if "→" not in track[1] for e in slices]) == len(
        shown.trace.timeline.spans
    )


@pytest.mark.parametrize(("layout", "microbatches", "planner", "costs"), CASES)
def test_arrows_are_paired_and_join_slices_forward_in_time(layout, microbatches, planner, costs):
    shown = panel(layout, microbatches, planner, **costs)
    events = events_of(shown)
    begins = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert begins.keys() == ends.keys()
    assert Counter(e["ph"] for e in events)["s"] == 2 * len(shown.trace.timeline.transfers) == len(begins)
    slices = {(e["pid"], e["tid"], e["ts"]): e for e in events if e["ph"] == "X"}
    for name, begin in begins.items():
        source, target = (slices[e["pid"], e["tid"], e["ts"]] for e in (begin, ends[name]))
        assert source["ts"] + source["dur"] <= target["ts"] + 1.001, (source, target)
        assert source["args"]["microbatch"] == target["args"]["microbatch"]
        if name.endswith(".used"):
            wanted = ("F",) if source["args"]["kind"] == "SEND_F" else ("B", "I")
            assert target["args"]["kind"] in wanted and target["ts"] >= source["args"]["arrived"] - 1e-6


def test_each_direction_of_a_link_is_one_track_without_overlaps():
    shown = panel(Layout.u(3), 6, latency=1.0, bandwidth=0.5)
    found = {name: slices for (_, name), slices in tracks(events_of(shown)).items() if "→" in name}
    pairs = [
        "edge → cloud 1",
        "cloud 1 → edge",
        "cloud 1 → cloud 2",
        "cloud 2 → cloud 1",
        "cloud 2 → edge",
        "edge → cloud 2",
    ]
    assert sorted(found) == sorted(pairs)
    for slices in found.values():
        assert len(slices) == 6
        ordered = sorted(slices, key=lambda e: e["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(ordered))


def test_measured_messages_that_overlap_get_tracks_of_their_own():
    """Slices of one track that overlap without nesting are shown wrong."""
    layout = Layout.u(2)
    transfers = tuple(Transfer(0, 1, Kind.SEND_F, 0, None, m, m * 1.0, m + 1.5, m + 2.0) for m in range(3))
    found = tracks(events_of(Panel("", Trace(layout, 3, Timeline(2, (), transfers), "s"))))
    assert {name: len(slices) for (_, name), slices in found.items()} == {"edge → cloud 1": 2, "edge → cloud 1 (2)": 1}


def test_several_steps_are_processes_of_their_own():
    one, two = panel(Layout.u(3), 4, "gpipe"), panel(Layout.u(3), 4)
    events = events_of(one, two)
    assert sorted({process for process, _ in tracks(events)}) == [
        "gpipe: cloud", "gpipe: edge", "ldt_1f1b: cloud", "ldt_1f1b: edge",
    ]  # fmt: skip
    assert len({(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}) == 2 * (3 + 6)


def test_a_slice_says_what_it_is():
    event = next(e for e in events_of(panel(Layout.u(3), 2)) if e["name"] == "B s3 m1")
    assert event["args"] == {"kind": "B", "stage": 3, "stage_name": "tail", "place": "tail", "microbatch": [1]}
