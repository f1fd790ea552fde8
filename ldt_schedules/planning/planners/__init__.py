"""Planners: `problem -> compute order`, one file each, chosen by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.lowering import lower
from ldt_schedules.planning.planners.auto import auto, auto_zb
from ldt_schedules.planning.planners.exact import exact
from ldt_schedules.planning.planners.gpipe import gpipe
from ldt_schedules.planning.planners.one_f_one_b import one_f_one_b
from ldt_schedules.planning.planners.published import ldt_1f1b, ldt_2lap_1f1b, with_backwards
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.simulator import simulate
from ldt_schedules.planning.table import ComputeOrder, ScheduleTable
from ldt_schedules.planning.timeline import Timeline
from ldt_schedules.planning.validator import check

EXACT_TIME_LIMIT_S = 60.0

Planner = Callable[[Problem], ComputeOrder]


def _fixed(rule: Callable[[Layout, int], ComputeOrder]) -> Planner:
    """A planner that looks at the layout alone."""
    return lambda problem: with_backwards(problem, rule(problem.layout, problem.num_microbatches), split=False)


def _exact(problem: Problem) -> ComputeOrder:
    """Optimal, for small problems: CP-SAT starts from what `auto` found. Fused where stages allow that."""
    return exact(problem, split=False, time_limit_s=EXACT_TIME_LIMIT_S, hint=auto(problem)).order


PLANNERS: dict[str, Planner] = {
    "ldt_1f1b": _fixed(ldt_1f1b),
    "gpipe": _fixed(gpipe),
    "ldt_2lap_1f1b": _fixed(ldt_2lap_1f1b),
    "one_f_one_b": _fixed(one_f_one_b),
    "auto": auto,
    "auto_zb": auto_zb,
    "exact": _exact,
}


PLAN_FOR_COSTS = ("auto", "auto_zb", "exact")
"""Planners whose order depends on what things cost; the others look at the layout alone."""


def plan(name: str, layout: Layout, num_microbatches: int, forward_only: bool = False) -> ScheduleTable:
    """A complete, validated table for default costs. Raises as `plan_problem` does."""
    return plan_problem(name, Problem(layout, num_microbatches), forward_only)


def plan_problem(name: str, problem: Problem, forward_only: bool = False) -> ScheduleTable:
    """A complete, validated table.

    An evaluation runs the forwards of the training order, in that order: what was executable with the backwards between
    them is executable without.

    Raises:
        ScheduleError: no such planner, or a layout that the planner does not know.
    """
    return table_of(planner(name)(problem), problem, forward_only)


def table_of(
    order: ComputeOrder, problem: Problem, forward_only: bool = False, timeline: Timeline | None = None
) -> ScheduleTable:
    """The validated table that runs `order`; `timeline` is its simulation, if that is at hand."""
    if forward_only:
        order, timeline = tuple(tuple(action for action in row if action.kind is Kind.F) for row in order), None
    timeline = timeline or simulate(problem.layout, order, problem.costs)
    table = lower(problem.layout, problem.num_microbatches, order, forward_only, timeline=timeline)
    check(table)
    return table


def planner(name: str) -> Planner:
    """The planner of that name.

    Raises:
        ScheduleError: there is none; the message has the nearest name.
    """
    if name not in PLANNERS:
        near = difflib.get_close_matches(name, PLANNERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ScheduleError(f"there is no planner {name!r}{hint} (there are {', '.join(PLANNERS)})")
    return PLANNERS[name]
