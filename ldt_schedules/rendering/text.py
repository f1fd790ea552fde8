"""A timeline as text: one line a pipeline rank, time to the right.

    edge     S0 S1 S2 ·· ·· ·· E0 e0-- ...

A computation is a letter and its microbatch, filled up to its length: head `F`/`B`, tail `T`/`t`, cloud `F`/`B`.
"""

from __future__ import annotations

from ldt_schedules.planning.actions import Action, Kind, format_microbatches
from ldt_schedules.planning.layout import EDGE_RANK, Layout
from ldt_schedules.planning.timeline import Span, Timeline

_IDLE = "·"
_LETTERS = {Kind.F: "F", Kind.B: "B", Kind.I: "I", Kind.W: "W"}
_TAIL_LETTERS = {Kind.F: "T", Kind.B: "t", Kind.I: "i", Kind.W: "w"}
_LEGEND = "F forward, B backward; on the edge F, B are the head's (FS, BE), T, t the tail's (FE, BS); · idle"


def timeline_lines(layout: Layout, timeline: Timeline, width: int = 100) -> list[str]:
    """The picture, in lines of at most `width` characters; a step too long for one block goes on in further blocks.

    Args:
        timeline: of any unit of time; the shortest computation decides the scale.
    """
    names = [_rank_name(layout, rank) for rank in range(timeline.num_ranks)]
    margin = max(map(len, names)) + 2
    scale = _characters_per_time(layout, timeline)
    rows = [_row(layout, spans, timeline, scale) for spans in timeline.rows]
    length = max(map(len, rows), default=0)
    room = max(10, width - margin)
    lines: list[str] = []
    for start in range(0, length, room):
        if start:
            lines.append("")
        lines += [
            f"{name.ljust(margin)}{row.ljust(length, _IDLE)[start : start + room]}"
            for name, row in zip(names, rows, strict=True)
        ]
    idle = ", ".join(f"{name} {timeline.bubble_of(rank):.0%}" for rank, name in enumerate(names))
    lines += ["", f"makespan {timeline.makespan:g}, bubble {timeline.bubble:.1%} ({idle})", _LEGEND]
    return lines


def _rank_name(layout: Layout, rank: int) -> str:
    return "edge" if rank == EDGE_RANK else f"cloud {rank}"


def _characters_per_time(layout: Layout, timeline: Timeline) -> float:
    """Wide enough that every label fits into its computation."""
    needed = [
        len(_label(layout, span.action)) / (span.end - span.start) for span in timeline.spans if span.end > span.start
    ]
    return max(needed, default=1.0)


def _row(layout: Layout, spans: tuple[Span, ...], timeline: Timeline, scale: float) -> str:
    text = ""
    for span in spans:
        start, end = round(span.start * scale), round(span.end * scale)
        text = text.ljust(start, _IDLE)
        text += _label(layout, span.action).ljust(end - start, "-")
    return text.ljust(round(timeline.makespan * scale), _IDLE)


def _label(layout: Layout, action: Action) -> str:
    is_tail = layout.is_tail(action.stage) and not layout.is_head(action.stage)
    letters = _TAIL_LETTERS if is_tail else _LETTERS
    return f"{letters[action.kind]}{format_microbatches(action.microbatches)}".ljust(2) + " "
