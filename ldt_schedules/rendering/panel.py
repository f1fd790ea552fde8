"""What every picture starts from: a trace with a title, and the names of ranks and stages that readers see."""

from __future__ import annotations

from dataclasses import dataclass

from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.formats.trace_json import SECONDS, Trace
from ldt_schedules.planning.layout import EDGE_RANK, Layout

KIND_NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}

FIRST, LATER, TAIL = "first", "later", "tail"
"""Which of a rank's stages: the one it runs first (the edge's head), a later one (of a second lap), the tail."""


@dataclass(frozen=True)
class Panel:
    """One step of a picture that may hold several; `bound` is a time that no schedule of this problem beats."""

    title: str
    trace: Trace
    bound: float | None = None

    @property
    def heading(self) -> str:
        """The title with the figures that schedules are compared by."""
        timeline = self.trace.timeline
        figures = [f"makespan {format_time(timeline.makespan, self.trace.unit)}", f"bubble {timeline.bubble:.1%}"]
        if self.bound:
            above = timeline.makespan / self.bound - 1
            how_far = "reached" if abs(above) < 1e-6 else f"{above:+.1%}"
            figures.append(f"lower bound {format_time(self.bound, self.trace.unit)} ({how_far})")
        return f"{self.title}: {', '.join(figures)}"


def has_edge(layout: Layout) -> bool:
    """Does rank 0 hold both ends, data and loss, as the edge of a U does?"""
    stages = layout.stages_on(EDGE_RANK)
    return any(map(layout.is_head, stages)) and any(map(layout.is_tail, stages))


def rank_name(rank: int, layout: Layout) -> str:
    """`edge`, `cloud 1`, `cloud 2`, …; in a layout without an edge `rank 0`, `rank 1`, …"""
    if not has_edge(layout):
        return f"rank {rank}"
    return "edge" if rank == EDGE_RANK else f"cloud {rank}"


def place_of(layout: Layout, stage: int) -> str:
    """FIRST, LATER or TAIL: which of its rank's stages this one is."""
    if layout.is_tail(stage) and not layout.is_head(stage):
        return TAIL
    return FIRST if layout.stages_on(layout.stages[stage].ranks[0])[0] == stage else LATER


def readable_unit(unit: str, longest: float) -> tuple[float, str]:
    """What to multiply times by, and the unit they then have: short steps in ms or µs, other units as they are."""
    if unit != SECONDS or longest >= 1 or longest <= 0:
        return 1.0, unit
    return (1e3, "ms") if longest >= 1e-3 else (1e6, "µs")


def format_time(time: float, unit: str) -> str:
    """`0.0412, "s"` -> `41.2 ms`; `41, "forwards"` -> `41 forwards`."""
    factor, name = readable_unit(unit, time)
    return f"{time * factor:.5g} {name}"
