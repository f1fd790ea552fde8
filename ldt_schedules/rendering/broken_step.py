"""A step that broke off, as a picture: the timeline as it was planned, with what each rank had done of it.

    edge     ■0 ■1 ✗2 □3 …      filled: done; hollow: not begun; hatched: under way or waiting
    cloud 1     ■0 ▨1 □2 …      a red cross: here it began

Times are the plan's, not those of the run: how far each rank came is read along the plan's own clock. Messages have no
box; a rank that stopped at one has its mark between two boxes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldt_schedules.planning.actions import format_microbatches
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.reached import Reached, State
from ldt_schedules.planning.timeline import Span, Timeline
from ldt_schedules.rendering.panel import KIND_NAMES, TAIL, place_of, rank_name
from ldt_schedules.rendering.picture import COLOURS, check_available

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RED, _GREY, _WAITING = "#C0182B", "#9A9A9A", "#7A5195"
_HALF = 0.36
_HATCHED = {State.RUNNING, State.WAITING, State.FAILED}
_MARKS = {State.FAILED: ("X", _RED), State.WAITING: ("D", _WAITING), State.RUNNING: (">", "black")}


def picture_of_broken_step(
    layout: Layout, timeline: Timeline, rows: Sequence[Reached], title: str, format_name: str
) -> bytes:
    """The file's content, .png or .svg.

    Args:
        timeline: simulated, of the same rows.

    Raises:
        ScheduleError: matplotlib is missing.
    """
    check_available()
    import matplotlib

    figure = _draw(layout, timeline, rows, title)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ldt"}):
        metadata = {"Date": None} if format_name == "svg" else None
        figure.savefig(buffer, format=format_name, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _draw(layout: Layout, timeline: Timeline, rows: Sequence[Reached], title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = min(24.0, max(9.0, 0.3 * timeline.makespan + 4))
    figure = Figure(
        figsize=(width, max(0.5, min(0.8, width / 20)) * len(rows) + 1.6), layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    points = 72 * (width - 4) / (timeline.makespan or 1.0)
    for rank, reached in enumerate(rows):
        _draw_rank(ax, layout, timeline.rows[rank], reached, rank, points)
        ax.text(
            1.005, rank, _in_words(reached), transform=ax.get_yaxis_transform(), fontsize=7.5, color="#333333",
            va="center",
        )  # fmt: skip
    ax.set_xlim(0, timeline.makespan or 1.0)
    ax.set_ylim(len(rows) - 0.45, -0.55)
    ax.set_yticks(range(len(rows)), [rank_name(rank, layout) for rank in range(len(rows))], fontsize=9)
    ax.set_xlabel("the plan's time (forwards)", fontsize=8, labelpad=1)
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.set_title(_wrapped(title, int(width * 12)), loc="left", fontsize=9.5, fontweight="bold")
    _add_legend(figure, layout, timeline)
    return figure


def _draw_rank(ax: Axes, layout: Layout, spans: Sequence[Span], reached: Reached, rank: int, points: float) -> None:
    computes = [index for index, action in enumerate(reached.actions) if action.kind.is_compute]
    places = dict(zip(computes, spans, strict=True))
    for index, span in places.items():
        _draw_box(ax, layout, span, reached.state_of(index), rank, points)
    if reached.at is None or reached.state not in _MARKS:
        return
    later = [index for index in computes if index >= reached.at]
    here = places.get(reached.at)
    if here is not None:
        x = (here.start + here.end) / 2
    elif later:
        x = places[later[0]].start  # at a message: where the next computation would begin
    else:
        x = spans[-1].end if spans else 0.0
    marker, colour = _MARKS[reached.state]
    ax.scatter(
        [x], [rank], s=90, marker=marker, color=colour, edgecolors="white", linewidths=1, zorder=6, clip_on=False
    )


def _draw_box(ax: Axes, layout: Layout, span: Span, state: State, rank: int, points: float) -> None:
    from matplotlib.patches import Rectangle

    place = place_of(layout, span.action.stage)
    colour = COLOURS[span.action.kind, place]
    done = state is State.DONE
    edge = _RED if state is State.FAILED else _GREY if state is State.UNKNOWN else colour
    box = Rectangle(
        (span.start, rank - _HALF), span.end - span.start, 2 * _HALF, facecolor=colour if done else "white",
        edgecolor="white" if done else edge, linewidth=0.6 if done else 2.0 if state is State.FAILED else 1.0,
        linestyle=":" if state is State.UNKNOWN else "-", hatch="////" if state in _HATCHED else None,
        zorder=3 if done else 4,
    )  # fmt: skip
    box.set_gid(f"{state.name.lower()}-{rank}-{span.action.kind}-s{span.action.stage}")
    ax.add_patch(box)
    label = format_microbatches(span.action.microbatches)
    if len(label) * 6 > (span.end - span.start) * points or state in _MARKS:
        return
    ax.text(
        (span.start + span.end) / 2, rank, label, fontsize=7, ha="center", va="center", zorder=5, clip_on=True,
        color="white" if done and place == TAIL else "black" if done else "#666666", in_layout=False,
    )  # fmt: skip


def _in_words(reached: Reached) -> str:
    """`4 of 21, failed at F s0 m1`."""
    if reached.done is None:
        return "nothing is known"
    text = f"{reached.done} of {len(reached.actions)}"
    return text if reached.at is None else f"{text}, {reached.state} at {reached.actions[reached.at]}"


def _wrapped(text: str, width: int) -> str:
    import textwrap

    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
    return "\n".join([*lines[:4], "…"] if len(lines) > 5 else lines)


def _add_legend(figure: Figure, layout: Layout, timeline: Timeline) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = {(span.action.kind, place_of(layout, span.action.stage)) for span in timeline.spans}
    handles: list[Line2D | Patch] = []
    for (kind, place), colour in COLOURS.items():
        if (kind, place) in used:
            suffix = ", tail" if place == TAIL else "" if place == "first" else ", later stage"
            handles.append(Patch(facecolor=colour, label=KIND_NAMES[kind] + suffix))
    handles.append(Patch(facecolor="white", edgecolor=_GREY, label="not begun"))
    handles.append(Patch(facecolor="white", edgecolor=_GREY, linestyle=":", label="not known"))
    for state, (marker, colour) in _MARKS.items():
        handles.append(
            Line2D([], [], color=colour, linestyle="none", marker=marker, markersize=7, label=f"{state} here")
        )
    figure.legend(handles=handles, loc="outside lower left", ncols=min(9, len(handles)), fontsize=8, frameon=False)
