"""Planners: `(layout, num_microbatches) -> compute order`, one file each, chosen by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.lowering import lower
from ldt_schedules.planning.planners.gpipe import gpipe
from ldt_schedules.planning.planners.ldt_1f1b import ldt_1f1b
from ldt_schedules.planning.table import ComputeOrder, ScheduleTable
from ldt_schedules.planning.validator import check

Planner = Callable[[Layout, int], ComputeOrder]

PLANNERS: dict[str, Planner] = {"ldt_1f1b": ldt_1f1b, "gpipe": gpipe}


def plan(name: str, layout: Layout, num_microbatches: int, forward_only: bool = False) -> ScheduleTable:
    """A complete, validated table.

    An evaluation runs the forwards of the training order, in that order: what was executable with the backwards between
    them is executable without.

    Raises:
        ScheduleError: no such planner, fewer than 1 microbatch, or a layout that the planner does not know.
    """
    if name not in PLANNERS:
        near = difflib.get_close_matches(name, PLANNERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ScheduleError(f"there is no planner {name!r}{hint} (there are {', '.join(PLANNERS)})")
    if num_microbatches < 1:
        raise ScheduleError(f"a step needs at least 1 microbatch, got {num_microbatches}")
    order = PLANNERS[name](layout, num_microbatches)
    if forward_only:
        order = tuple(tuple(action for action in row if action.kind is Kind.F) for row in order)
    table = lower(layout, num_microbatches, order, forward_only)
    check(table)
    return table
