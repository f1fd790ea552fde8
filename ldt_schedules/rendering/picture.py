"""Timelines as a Gantt chart, .png or .svg: who computes what when, and which messages fly.

    edge     ▇0▇1▇2      ▇0▓0▓▓▇1 ...     one row a rank, one box a computation, its microbatch inside
    cloud 1     ╲▇0▇1▇2▇3 ...             grey is idle; arrows are messages, from the end of SEND to the arrival

Several steps stand below each other on one scale of time, so that lengths can be compared by eye: a plan and the run
that was measured, or two planners. Steps in different units keep a scale each.

A step has thousands of boxes. Each colour is therefore one collection, a number is left out where its box is too
narrow, and of too many messages only every k-th microbatch's are drawn (the legend says which).

Colours are those of Okabe and Ito, which colour-blind readers tell apart; stages on one rank differ in lightness.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ldt_schedules.planning.actions import Kind, format_microbatches
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.timeline import Span, Transfer
from ldt_schedules.rendering.panel import FIRST, KIND_NAMES, LATER, TAIL, Panel, place_of, rank_name, readable_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
MAX_ARROWS = 250
COLOURS = {
    (Kind.F, FIRST): "#8CCBF0", (Kind.F, LATER): "#3F9BD1", (Kind.F, TAIL): "#005A92",
    (Kind.B, FIRST): "#F5BE4F", (Kind.B, LATER): "#E08A1E", (Kind.B, TAIL): "#B84A00",
    (Kind.I, FIRST): "#6FCFB1", (Kind.I, LATER): "#1FA37C", (Kind.I, TAIL): "#00644A",
    (Kind.W, FIRST): "#E3B1CC", (Kind.W, LATER): "#C678A2", (Kind.W, TAIL): "#87426A",
}  # fmt: skip
_IDLE = "#E9E9E9"
_ARROWS = {Kind.SEND_F: ("#0072B2", "activation"), Kind.SEND_B: ("#D55E00", "gradient")}
_HALF = 0.37  # of a box's height, in rows
_MARGIN = 1.7  # inches beside the axes: names at the left, idle shares at the right
_MIN_FONT, _MAX_FONT = 4.5, 8.0
_POINTS = 72


def check_available() -> None:
    """Raises ScheduleError where matplotlib cannot be imported: before the user waits for a plan."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ScheduleError(
            f"a picture as .png or .svg needs matplotlib ({error}); pip install 'ldt-schedules[plot]', or draw to .txt"
        ) from None


def picture_bytes(panels: Sequence[Panel], format_name: str) -> bytes:
    """The file's content, in one of `FORMATS`; equal panels give equal text in an SVG.

    Raises:
        ScheduleError: matplotlib is missing.
    """
    check_available()
    import matplotlib

    figure = draw_figure(panels)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ldt"}):
        metadata = {"Date": None} if format_name == "svg" else None
        figure.savefig(buffer, format=format_name, dpi=150, metadata=metadata)
    return buffer.getvalue()


def draw_figure(panels: Sequence[Panel]) -> Figure:
    """The figure, of no window and no global state: the caller's alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    limits = _limits(panels)
    width = max(_wanted_width(panel, limits[panel.trace.unit]) for panel in panels)
    heights = [_row_height(panel, width) * panel.trace.layout.num_ranks + 0.75 for panel in panels]
    figure = Figure(figsize=(width, sum(heights) + 0.7), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    every = max(max(1, math.ceil(len(panel.trace.timeline.transfers) / MAX_ARROWS)) for panel in panels)
    for number, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
        _draw_panel(ax, panel, limits[panel.trace.unit], (width - _MARGIN) * _POINTS, every, number)
    _add_legend(figure, panels, width, every)
    return figure


def _limits(panels: Sequence[Panel]) -> dict[str, float]:
    """The end of the axis for each unit of time."""
    limits: dict[str, float] = defaultdict(float)
    for panel in panels:
        limits[panel.trace.unit] = max(limits[panel.trace.unit], panel.trace.timeline.makespan, panel.bound or 0.0)
    return {unit: limit or 1.0 for unit, limit in limits.items()}


def _wanted_width(panel: Panel, limit: float) -> float:
    """Inches, so that most numbers stand upright; a very long step gets what a screen can still show."""
    durations = sorted(span.end - span.start for span in panel.trace.timeline.spans if span.end > span.start)
    if not durations:
        return 9.0
    short = durations[len(durations) // 3]
    digits = len(str(panel.trace.num_microbatches - 1))
    return min(24.0, max(9.0, limit / short * (5.5 * digits + 3) / _POINTS + _MARGIN))


def _row_height(panel: Panel, width: float) -> float:
    """Inches; higher in a wide picture, which would be a ribbon otherwise."""
    return max(0.33, min(0.7, width / 6 / panel.trace.layout.num_ranks))


def _draw_panel(ax: Axes, panel: Panel, limit: float, points: float, every: int, number: int) -> None:
    timeline, layout = panel.trace.timeline, panel.trace.layout
    factor, unit = readable_unit(panel.trace.unit, limit)
    ranks = range(timeline.num_ranks)
    ax.set_xlim(0, limit * factor)
    ax.set_ylim(timeline.num_ranks - 0.4, -0.6)
    idle = [_box(rank, 0, timeline.makespan * factor) for rank in ranks]
    _add_boxes(ax, idle, _IDLE, f"idle-{number}", zorder=1, linewidth=0)
    _add_arrows(ax, timeline.transfers, factor, every)
    _add_spans(ax, panel, factor, points / (limit * factor), number)
    if panel.bound is not None:
        ax.axvline(panel.bound * factor, color="black", linestyle=(0, (5, 3)), linewidth=1.2, zorder=6, clip_on=False)
    ax.set_yticks(list(ranks), [rank_name(rank, layout) for rank in ranks], fontsize=9)
    for rank in ranks:
        share = f"idle {timeline.bubble_of(rank):.0%}" if layout.stages_on(rank) else "no stage"
        ax.text(1.004, rank, share, transform=ax.get_yaxis_transform(), fontsize=7, color="#555555", va="center")
    ax.set_title(panel.heading, loc="left", fontsize=10, fontweight="bold")
    ax.set_xlabel(f"time ({unit})", fontsize=8, labelpad=1)
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def _add_spans(ax: Axes, panel: Panel, factor: float, points_per_time: float, number: int) -> None:
    """The boxes, one collection for each colour, and the numbers in them."""
    layout, all_spans = panel.trace.layout, panel.trace.timeline.spans
    places = [place_of(layout, stage.index) for stage in layout.stages]
    groups: dict[tuple[Kind, str], list[Span]] = defaultdict(list)
    for span in all_spans:
        groups[span.action.kind, places[span.action.stage]].append(span)
    widths = sorted((span.end - span.start) * factor * points_per_time for span in all_spans)
    border = 0.5 if widths and widths[len(widths) // 10] > 3 else 0.0
    for (kind, place), spans in groups.items():
        boxes = [_box(span.rank, span.start * factor, span.end * factor) for span in spans]
        _add_boxes(ax, boxes, COLOURS[kind, place], f"spans-{number}-{kind}-{place}", zorder=3, linewidth=border)
    _add_numbers(ax, panel, factor, points_per_time)


def _add_numbers(ax: Axes, panel: Panel, factor: float, points_per_time: float) -> None:
    """Upright where they fit, else written upwards, else none."""
    spans = panel.trace.timeline.spans
    digits = len(str(panel.trace.num_microbatches - 1))
    labels = [format_microbatches(span.action.microbatches) for span in spans]
    lengths = [max(digits, len(label)) for label in labels]  # where m99 shows none, m5 shows none
    widths = [(span.end - span.start) * factor * points_per_time for span in spans]
    size = _font_size(lengths, widths)
    for span, label, length, width in zip(spans, labels, lengths, widths, strict=True):
        upright = _text_width(length, size) <= width
        if not upright and width < 0.85 * size:
            continue
        dark = place_of(panel.trace.layout, span.action.stage) == TAIL
        ax.text(
            (span.start + span.end) / 2 * factor, span.rank, label, fontsize=size, color="white" if dark else "black",
            ha="center", va="center_baseline" if upright else "center", rotation=0 if upright else 90, zorder=4,
            clip_on=True, in_layout=False,
        )  # fmt: skip


def _text_width(length: int, size: float) -> float:
    """In points; a digit is 0.64 of the font's size wide."""
    return 0.64 * size * length + 0.8


def _font_size(lengths: list[int], widths: list[float]) -> float:
    """One size for all boxes, the largest that nine of ten labels fit into, so that sizes do not look like meaning."""
    fitting = sorted((width - 0.8) / (0.64 * length) for length, width in zip(lengths, widths, strict=True))
    wanted = fitting[len(fitting) // 10] if fitting else _MAX_FONT
    return min(_MAX_FONT, max(_MIN_FONT, wanted))


def _box(rank: int, start: float, end: float) -> list[tuple[float, float]]:
    return [(start, rank - _HALF), (end, rank - _HALF), (end, rank + _HALF), (start, rank + _HALF)]


def _add_boxes(
    ax: Axes, boxes: list[list[tuple[float, float]]], colour: str, name: str, zorder: float, linewidth: float
) -> None:
    from matplotlib.collections import PolyCollection

    collection = PolyCollection(boxes, facecolors=colour, edgecolors="white", linewidths=linewidth, zorder=zorder)
    collection.set_gid(name)
    ax.add_collection(collection, autolim=False)


def _add_arrows(ax: Axes, transfers: tuple[Transfer, ...], factor: float, every: int) -> None:
    """Shafts run below the boxes, so that numbers stay readable; heads above them."""
    from matplotlib.collections import LineCollection

    for kind, (colour, _) in _ARROWS.items():
        drawn = [t for t in transfers if t.kind is kind and t.microbatch % every == 0]
        shafts = []
        for transfer in drawn:
            towards = _HALF if transfer.receiver > transfer.sender else -_HALF
            tip = (transfer.arrived * factor, transfer.receiver - towards)
            shafts.append([(transfer.start * factor, transfer.sender + towards), tip])
        ax.add_collection(LineCollection(shafts, colors=colour, linewidths=0.7, alpha=0.75, zorder=2), autolim=False)
        for marker, sign in (("v", 1), ("^", -1)):
            tips = [shaft[1] for shaft, t in zip(shafts, drawn, strict=True) if (t.receiver - t.sender) * sign > 0]
            if tips:
                xs, ys = zip(*tips, strict=True)
                ax.scatter(xs, ys, s=7, marker=marker, color=colour, linewidths=0, zorder=5)


def _add_legend(figure: Figure, panels: Sequence[Panel], width: float, every: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    used = {
        (span.action.kind, place_of(panel.trace.layout, span.action.stage))
        for panel in panels
        for span in panel.trace.timeline.spans
    }
    for (kind, place), colour in COLOURS.items():
        if (kind, place) in used:
            suffix = {FIRST: "", LATER: ", later stage of the rank", TAIL: ", tail"}[place]
            handles.append(Patch(facecolor=colour, label=KIND_NAMES[kind] + suffix))
    handles.append(Patch(facecolor=_IDLE, label="idle"))
    thinned = "" if every == 1 else f" (1 microbatch in {every})"
    sent = {transfer.kind for panel in panels for transfer in panel.trace.timeline.transfers}
    for kind, (colour, name) in _ARROWS.items():
        if kind in sent:
            handles.append(Line2D([], [], color=colour, linewidth=1, marker=">", markersize=4, label=name + thinned))
    if any(panel.bound is not None for panel in panels):
        handles.append(Line2D([], [], color="black", linestyle=(0, (5, 3)), label="proven lower bound"))
    columns = max(1, min(len(handles), int(width / 1.9)))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
