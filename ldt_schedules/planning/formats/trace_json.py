"""The file format of a timeline, `ldt-trace/1`: when everything happened, simulated or measured, as JSON.

    {"format": "ldt-trace/1", "unit": "s", "num_microbatches": 2,
     "stages": [as in ldt-table/1],
     "spans": [[0, "F s0 m0", 0.0, 0.011], ...],                            rank, computation, start, end
     "transfers": [[0, 1, "SEND_F s0 m0 ->1", 0.011, 0.012, 0.032], ...]}   sender, receiver, SEND, start, sent, arrived

A table says what is to be done, a trace what was: whoever draws or compares a measured step needs no table beside it.
Times count from the start of the step. `"exposed"`, one time for each rank, is written where the timeline knows it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats.json_format import LAYOUT_KEYS, layout_content, read_action, read_layout
from ldt_schedules.planning.formats.json_object import expect_keys, get, parse_object, time_of
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.timeline import Span, Timeline, Transfer

FORMAT = "ldt-trace/1"
SECONDS = "s"
"""The unit of a measured step. Any other unit is only a word to put on the axis."""
_KEYS = ("format", "unit", "num_microbatches", *LAYOUT_KEYS, "spans", "transfers", "exposed")
_SPAN = ("rank", "computation", "start", "end")
_TRANSFER = ("sender", "receiver", "SEND", "start", "sent", "arrived")


@dataclass(frozen=True)
class Trace:
    """A timeline with what is needed to read it.

    Raises:
        ScheduleError: an action of a stage or a microbatch that does not exist, or that is not done on its rank; an end
            before its start.
    """

    layout: Layout
    num_microbatches: int
    timeline: Timeline
    unit: str = SECONDS

    def __post_init__(self) -> None:
        self.layout.check_microbatches(self.num_microbatches)
        num_ranks = self.layout.num_ranks
        if self.timeline.num_ranks != num_ranks or len(self.timeline.exposed) not in (0, num_ranks):
            raise ScheduleError(f"the timeline does not have the pipeline ranks 0..{num_ranks - 1} of the layout")
        for index, span in enumerate(self.timeline.spans):
            self._check(f"span {index}", span.action, span.rank, (span.start, span.end))
            if not span.action.kind.is_compute:
                raise ScheduleError(f"span {index}: {span.action} computes nothing; messages go to the transfers")
        for index, transfer in enumerate(self.timeline.transfers):
            times = (transfer.start, transfer.sent, transfer.arrived)
            self._check(f"transfer {index}", transfer.send, transfer.sender, times)
            if not 0 <= transfer.receiver < num_ranks:
                raise ScheduleError(f"transfer {index}: there is no rank {transfer.receiver}")

    def _check(self, where: str, action: Action, rank: int, times: tuple[float, ...]) -> None:
        if action.stage >= len(self.layout.stages) or max(action.microbatches) >= self.num_microbatches:
            raise ScheduleError(
                f"{where}: {action} is of no stage 0..{len(self.layout.stages) - 1} or no microbatch "
                f"0..{self.num_microbatches - 1}"
            )
        right = {self.layout.rank_of(action.stage, m) for m in action.microbatches}
        if right != {rank}:
            raise ScheduleError(f"{where}: {action} is done on rank {min(right)}, not on rank {rank}")
        if list(times) != sorted(times):
            raise ScheduleError(f"{where}: {action} ends before it starts: {', '.join(f'{t:g}' for t in times)}")


def is_trace(text: str) -> bool:
    """Does the file call itself a trace? Whether it is a good one, `loads` tells."""
    try:
        return str(parse_object(text).get("format", "")).startswith("ldt-trace/")
    except ScheduleError:
        return False


def dumps(trace: Trace) -> str:
    """The trace as text, one entry a line; equal traces give equal text."""
    timeline = trace.timeline
    content = {"format": FORMAT, "unit": trace.unit, "num_microbatches": trace.num_microbatches}
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in (content | layout_content(trace.layout)).items()
    ]
    spans = [[span.rank, str(span.action), span.start, span.end] for span in timeline.spans]
    transfers = [[t.sender, t.receiver, str(t.send), t.start, t.sent, t.arrived] for t in timeline.transfers]
    for key, rows in (("spans", spans), ("transfers", transfers)):
        lines.append(f'"{key}": [' + ",".join("\n  " + json.dumps(row, allow_nan=False) for row in rows) + "]")
    if timeline.exposed:
        lines.append(f'"exposed": {json.dumps(timeline.exposed, allow_nan=False)}')
    return "{" + ",\n ".join(lines) + "}\n"


def loads(text: str) -> Trace:
    """Read a trace; spans may stand in any order.

    Raises:
        ScheduleError: cut off, not JSON, another format, a missing or unknown key, a wrong type, an action that cannot be
            read, or what `Trace` refuses.
    """
    content = parse_object(text)
    if content.get("format") != FORMAT:
        raise ScheduleError(f'this is no trace: "format" is {content.get("format")!r}, expected "{FORMAT}"')
    expect_keys(content, _KEYS, "a trace")
    layout = read_layout(content)
    spans = [_span(row, number) for number, row in enumerate(get(content, "spans", list))]
    transfers = [_transfer(row, number) for number, row in enumerate(get(content, "transfers", list))]
    exposed = get(content, "exposed", list) if "exposed" in content else []
    timeline = Timeline(
        layout.num_ranks,
        tuple(sorted(spans, key=lambda span: span.end)),
        tuple(transfers),
        tuple(time_of(time, f"the exposed time of rank {rank}") for rank, time in enumerate(exposed)),
    )
    return Trace(layout, get(content, "num_microbatches", int), timeline, get(content, "unit", str))


def _span(row: object, number: int) -> Span:
    where = f"span {number}"
    rank, action, start, end = _entries(row, where, _SPAN)
    return Span(
        _rank(rank, where), _action(action, where), time_of(start, f"{where}: start"), time_of(end, f"{where}: end")
    )


def _transfer(row: object, number: int) -> Transfer:
    where = f"transfer {number}"
    sender, receiver, text, *times = _entries(row, where, _TRANSFER)
    send = _action(text, where)
    if not send.kind.is_send or send.peer != _rank(receiver, where) or len(send.microbatches) > 1:
        raise ScheduleError(f"{where}: {send} is no SEND of one microbatch to rank {receiver}")
    start, sent, arrived = (time_of(time, f"{where}: {name}") for time, name in zip(times, _TRANSFER[3:], strict=True))
    return Transfer(
        _rank(sender, where), receiver, send.kind, send.stage, send.other, send.microbatches[0], start, sent, arrived
    )


def _entries(row: object, where: str, names: tuple[str, ...]) -> list[Any]:
    if not isinstance(row, list) or len(row) != len(names):
        raise ScheduleError(f"{where}: expected [{', '.join(names)}], got {row!r}")
    return row


def _rank(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ScheduleError(f"{where}: the rank is {value!r}; expected a whole number")
    return value


def _action(text: object, where: str) -> Action:
    try:
        return read_action(text)
    except ScheduleError as error:
        raise ScheduleError(f"{where}: {error}") from None
