"""Small charts as PNG files: bars, a line, a pie. The drawing alone; what is asked about them is in `charts`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ldt_schedules.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_EXTRA = "pip install 'ldt-schedules[plot]'"
COLOURS = {
    "blue": "#1F77B4",
    "orange": "#FF9A1F",
    "green": "#2CA02C",
    "red": "#D62728",
    "purple": "#8A4FC7",
    "grey": "#8C8C8C",
    "black": "#222222",
}
"""By names that everybody would call them."""

_DPI = 100
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 6.5,
    "axes.titlesize": 7.5,
    "axes.titlepad": 3.0,
    "axes.labelpad": 1.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 2.0,
    "ytick.major.size": 2.0,
    "xtick.major.pad": 1.5,
    "ytick.major.pad": 1.5,
}


_MARGINS = {"bar": (34, 8, 16, 16), "line": (34, 14, 16, 16), "pie": (38, 38, 28, 16)}
"""Left, right, top, bottom, in pixels: matplotlib's own search for them takes longer than the drawing."""


@dataclass(frozen=True)
class Chart:
    """What a chart shows.

    Attributes:
        colours: names from `COLOURS`, one for each value; a line has the first.
        size: width and height, pixels.
        top: end of the vertical axis; the same over the frames of a video.
    """

    kind: Literal["bar", "line", "pie"]
    title: str
    labels: tuple[str, ...]
    values: tuple[int, ...]
    colours: tuple[str, ...]
    size: tuple[int, int]
    unit: str = ""
    top: int = 100


def draw(chart: Chart, file: Path) -> None:
    """Write a PNG of exactly `chart.size`. Equal charts give equal pixels with one version of matplotlib.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"data.path null draws charts, which needs matplotlib ({error}): {PLOT_EXTRA}, or set data.path"
        ) from None
    # Whatever the user's own matplotlibrc says.
    with style.context(["default", _STYLE]):
        width, height = chart.size
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        FigureCanvasAgg(figure)
        left, right, top, bottom = _MARGINS[chart.kind]
        figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
        axes = figure.add_subplot()
        axes.set_title(chart.title, pad=12.0 if chart.kind == "pie" else None)
        {"bar": _bars, "line": _line, "pie": _pie}[chart.kind](axes, chart)
        figure.savefig(file, format="png", metadata={"Software": None})


def _bars(axes: Axes, chart: Chart) -> None:
    axes.bar(chart.labels, chart.values, color=[COLOURS[name] for name in chart.colours], width=0.7)
    _scale(axes, chart)


def _line(axes: Axes, chart: Chart) -> None:
    axes.plot(chart.labels, chart.values, color=COLOURS[chart.colours[0]], marker="o", markersize=3, linewidth=1.5)
    axes.grid(axis="y", linewidth=0.4, color="#DDDDDD")
    _scale(axes, chart)


def _scale(axes: Axes, chart: Chart) -> None:
    axes.set_ylim(0, chart.top)
    axes.set_yticks(range(0, chart.top + 1, chart.top // 4))
    axes.set_ylabel(chart.unit)


def _pie(axes: Axes, chart: Chart) -> None:
    wedge = {"linewidth": 0.6, "edgecolor": "white"}
    colours = [COLOURS[name] for name in chart.colours]
    axes.pie(chart.values, labels=chart.labels, colors=colours, wedgeprops=wedge, labeldistance=1.08, radius=1.15)
