"""Timelines as Chrome trace events, the JSON that ui.perfetto.dev and chrome://tracing open.

    edge      pipeline rank 0       ▇F s0 m0▇F s0 m1▇ ...         a process for each site, a track for each rank
              edge → cloud 1        ▪SEND_F m0─╮                  and one for each direction of a link: on the wire
    cloud     cloud 1                          ╰►▇F s1 m0▇        arrows: made by, sent, used by

A layout without an edge (`has_edge`) is one process, its tracks are rank 0, rank 1, …

A slice on a link ends when its message has left; what is missing until the arrow's end is latency. Messages wait for
each other's wire, so one track holds them all; only a measured link may have two on the wire at once, and then has a
second track, because slices of a track must not overlap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ldt_schedules.planning.dependencies import Dataflow
from ldt_schedules.planning.formats.trace_json import SECONDS, Trace
from ldt_schedules.planning.layout import EDGE_RANK
from ldt_schedules.planning.timeline import Span, Transfer
from ldt_schedules.rendering.panel import KIND_NAMES, Panel, has_edge, place_of, rank_name

_SITES = ("edge", "cloud")
_ONE_SITE = ("pipeline",)
_SHORTEST_US = 1.0  # a message of no size would be a slice that nobody can see and no arrow can start from

_Event = dict[str, Any]


def perfetto_json(panels: Sequence[Panel]) -> str:
    """The file's content; several steps are several pairs of processes, all from time 0."""
    events: list[_Event] = []
    for number, panel in enumerate(panels):
        prefix = f"{panel.title}: " if len(panels) > 1 else ""
        events += _Events(panel.trace, first_pid=1 + 2 * number, prefix=prefix).all()
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"


def microseconds(unit: str) -> float:
    """Of one unit: a second is 1 000 000; any other unit stands for a millisecond."""
    return 1e6 if unit == SECONDS else 1e3


class _Events:
    """The events of one trace; `tids` numbers the tracks in the order in which they shall stand."""

    def __init__(self, trace: Trace, first_pid: int, prefix: str) -> None:
        self.trace, self.first_pid, self.prefix = trace, first_pid, prefix
        self.scale = microseconds(trace.unit)
        self.flow = Dataflow(trace.layout)
        self.sites = _SITES if has_edge(trace.layout) else _ONE_SITE
        self.tids: dict[tuple[int, str], int] = {}
        for rank in range(trace.layout.num_ranks):
            self._track(rank, self._name(rank))

    def all(self) -> list[_Event]:
        events = [self._compute(span) for span in self.trace.timeline.spans]
        events += self._messages()
        return [*self._names(), *events]

    def _name(self, rank: int) -> str:
        return rank_name(rank, self.trace.layout)

    def _pid(self, rank: int) -> int:
        return self.first_pid + (rank != EDGE_RANK and self.sites == _SITES)

    def _track(self, rank: int, name: str) -> dict[str, int]:
        pid = self._pid(rank)
        return {"pid": pid, "tid": self.tids.setdefault((pid, name), len(self.tids) + 100 * self.first_pid)}

    def _names(self) -> Iterator[_Event]:
        def name(what: str, pid: int, tid: int, **args: object) -> _Event:
            return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}

        for pid in sorted({pid for pid, _ in self.tids}):
            yield name("process_name", pid, 0, name=self.prefix + self.sites[pid - self.first_pid])
            yield name("process_sort_index", pid, 0, sort_index=pid)
        for (pid, track), tid in self.tids.items():
            yield name("thread_name", pid, tid, name=track)
            yield name("thread_sort_index", pid, tid, sort_index=tid)

    def _compute(self, span: Span) -> _Event:
        action, layout = span.action, self.trace.layout
        return {
            "ph": "X",
            "name": str(action),
            "cat": KIND_NAMES[action.kind],
            **self._track(span.rank, self._name(span.rank)),
            "ts": span.start * self.scale,
            "dur": (span.end - span.start) * self.scale,
            "args": {
                "kind": action.kind.value,
                "stage": action.stage,
                "stage_name": layout.stages[action.stage].name,
                "place": place_of(layout, action.stage),
                "microbatch": list(action.microbatches),
            },
        }

    def _messages(self) -> Iterator[_Event]:
        spans = self.trace.timeline.spans
        maker = {value: span for span in spans for value in self.flow.makes(span.action)}
        taker = {value: span for span in spans for value in self.flow.takes(span.action)}
        wires: dict[tuple[int, int], list[float]] = {}
        transfers = sorted(self.trace.timeline.transfers, key=lambda transfer: transfer.start)
        for number, transfer in enumerate(transfers):
            sent = max(transfer.sent, transfer.start + _SHORTEST_US / self.scale)
            ends = wires.setdefault((transfer.sender, transfer.receiver), [])
            lane = next((lane for lane, end in enumerate(ends) if end <= transfer.start), len(ends))
            ends[lane : lane + 1] = [sent]
            slice_ = self._message(transfer, lane, sent)
            yield slice_
            (value,) = self.flow.takes(transfer.send)
            used_by = taker.get(self.flow.delivery(value))
            yield from self._arrows(f"{self.first_pid}.{number}", maker.get(value), slice_, used_by)

    def _message(self, transfer: Transfer, lane: int, sent: float) -> _Event:
        track = f"{self._name(transfer.sender)} → {self._name(transfer.receiver)}" + (f" ({lane + 1})" if lane else "")
        return {
            "ph": "X",
            "name": str(transfer.send),
            "cat": "transfer",
            **self._track(transfer.sender, track),
            "ts": transfer.start * self.scale,
            "dur": (sent - transfer.start) * self.scale,
            "args": {
                "kind": transfer.kind.value,
                "stage": transfer.stage,
                "microbatch": [transfer.microbatch],
                "arrived": transfer.arrived * self.scale,
            },
        }

    def _arrows(self, name: str, made_by: Span | None, message: _Event, used_by: Span | None) -> Iterator[_Event]:
        """From the computation over the wire to the computation; each arrow is a pair of its own id."""
        wire = {"pid": message["pid"], "tid": message["tid"], "ts": message["ts"]}
        if made_by is not None:
            yield from self._arrow(f"{name}.made", self._begin(made_by), wire)
        if used_by is not None:
            yield from self._arrow(f"{name}.used", wire, self._begin(used_by))

    def _begin(self, span: Span) -> dict[str, Any]:
        """Arrows tie slices, and leave the end of one whatever time is given; its beginning is surely inside it."""
        return {**self._track(span.rank, self._name(span.rank)), "ts": span.start * self.scale}

    def _arrow(self, name: str, source: dict[str, Any], target: dict[str, Any]) -> Iterator[_Event]:
        yield {"ph": "s", "name": "message", "cat": "message", "id": name, **source}
        yield {"ph": "f", "bp": "e", "name": "message", "cat": "message", "id": name, **target}
