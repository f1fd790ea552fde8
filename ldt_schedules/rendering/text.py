"""A timeline as text: one line a pipeline rank, time to the right.

    edge     S0 S1 S2 ·· ·· ·· E0 e0-- ...

A computation is a letter and its microbatch, filled up to its length: head `F`/`B`, tail `T`/`t`, cloud `F`/`B`. A split
backward is `I`, `W`, and `i`, `w` in the tail. A rank's second stage (of a second lap, or a second encoder) has the letters
that follow in the alphabet, all further ones those after them.
"""

from __future__ import annotations

from ldt_schedules.planning.actions import Action, Kind, format_microbatches
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.timeline import Span, Timeline
from ldt_schedules.rendering.panel import TAIL, has_edge, place_of, rank_name

_IDLE = "·"
_LETTERS = (
    {Kind.F: "F", Kind.B: "B", Kind.I: "I", Kind.W: "W"},
    {Kind.F: "G", Kind.B: "C", Kind.I: "J", Kind.W: "X"},
    {Kind.F: "H", Kind.B: "D", Kind.I: "K", Kind.W: "Y"},
)
_TAIL_LETTERS = {Kind.F: "T", Kind.B: "t", Kind.I: "i", Kind.W: "w"}
_LEGEND = "F forward, B backward; on the edge F, B are the head's (FS, BE), T, t the tail's (FE, BS); · idle"
_LEGEND_NO_EDGE = "F forward, B backward; T, t those of the last stage; · idle"
_LEGEND_SECOND = "G, C those of a rank's second stage"
_LEGEND_THIRD = ", H, D of the third and later ones"
_LEGEND_SPLIT = "I, W the backward in two, gradient of the input and gradient of the weights; i, w the tail's"


def timeline_lines(layout: Layout, timeline: Timeline, width: int = 100) -> list[str]:
    """The picture, in lines of at most `width` characters; a step too long for one block goes on in further blocks.

    Args:
        timeline: of any unit of time; the shortest computation decides the scale.
    """
    names = [rank_name(rank, layout) for rank in range(timeline.num_ranks)]
    margin = max(map(len, names)) + 2
    scale = _characters_per_time(layout, timeline)
    rows = [_row(layout, rank, spans, scale) for rank, spans in enumerate(timeline.rows)]
    length = max([round(timeline.makespan * scale), *map(len, rows)])
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
    lines += [
        "",
        f"makespan {timeline.makespan:g}, bubble {timeline.bubble:.1%} ({idle})",
        _LEGEND if has_edge(layout) else _LEGEND_NO_EDGE,
    ]
    most = max(len(_before_the_tail(layout, rank)) for rank in range(timeline.num_ranks))
    if most > 1:
        lines.append(_LEGEND_SECOND + (_LEGEND_THIRD if most > 2 else ""))
    if any(span.action.kind in (Kind.I, Kind.W) for span in timeline.spans):
        lines.append(_LEGEND_SPLIT)
    return lines


def _characters_per_time(layout: Layout, timeline: Timeline) -> float:
    """Wide enough that every label fits into its computation."""
    needed = [
        len(_label(layout, rank, span.action)) / (span.end - span.start)
        for rank, spans in enumerate(timeline.rows)
        for span in spans
        if span.end > span.start
    ]
    return max(needed, default=1.0)


def _row(layout: Layout, rank: int, spans: tuple[Span, ...], scale: float) -> str:
    text = ""
    for span in spans:
        start, end = round(span.start * scale), round(span.end * scale)
        text = text.ljust(start, _IDLE)
        text += _label(layout, rank, span.action).ljust(end - start, "-")
    return text


def _before_the_tail(layout: Layout, rank: int) -> list[int]:
    return [stage for stage in layout.stages_on(rank) if place_of(layout, stage) != TAIL]


def _label(layout: Layout, rank: int, action: Action) -> str:
    if place_of(layout, action.stage) == TAIL:
        letters = _TAIL_LETTERS
    else:
        letters = _LETTERS[min(_before_the_tail(layout, rank).index(action.stage), len(_LETTERS) - 1)]
    return f"{letters[action.kind]}{format_microbatches(action.microbatches)}".ljust(2) + " "
