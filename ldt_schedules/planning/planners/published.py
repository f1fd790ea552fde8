"""The orders that are published for the layouts we know: what a plan is measured against, and what memory it is given.

    a U                        ldt_1f1b
    a U of two laps            ldt_2lap_1f1b
    everything else            one_f_one_b

With several domains (one cloud pipeline each) the published code loops over the domains inside every operation: the
edge does its first operation for every domain, then its second, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import EDGE_RANK, Layout
from ldt_schedules.planning.planners.ldt_1f1b import one_lap_row
from ldt_schedules.planning.planners.ldt_2lap_1f1b import two_lap_row
from ldt_schedules.planning.planners.one_f_one_b import one_f_one_b
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.table import ComputeOrder
from ldt_schedules.planning.work_graph import backward_kinds

_RowRule = Callable[[int, int, int], list[Action]]
"""`(place on the ring, ranks of the ring, microbatches of the domain) -> row`."""


def ldt_1f1b(layout: Layout, num_microbatches: int) -> ComputeOrder:
    """The published order of a U with any number of domains, P >= 2 and any M >= 1.

    Raises:
        ScheduleError: the layout is no U.
    """
    return _round_the_ring(layout, num_microbatches, 1, one_lap_row, "ldt_1f1b")


def ldt_2lap_1f1b(layout: Layout, num_microbatches: int) -> ComputeOrder:
    """The published order of a two-lap U. Raises as `ldt_1f1b` does."""
    return _round_the_ring(layout, num_microbatches, 2, two_lap_row, "ldt_2lap_1f1b")


def published(problem: Problem) -> ComputeOrder:
    """The published order for the problem's layout; stages that can only do I and W do both where B would stand."""
    rule = _RULES[name_of_published(problem.layout)]
    return with_backwards(problem, rule(problem.layout, problem.num_microbatches), split=False)


def name_of_published(layout: Layout) -> str:
    """The name of the published order for a layout."""
    if layout.rings(1):
        return "ldt_1f1b"
    return "ldt_2lap_1f1b" if layout.rings(2) else "one_f_one_b"


def with_backwards(problem: Problem, order: ComputeOrder, split: bool) -> ComputeOrder:
    """Every B of `order` as the problem's stages do it: B, or I and W one after the other, or nothing where nobody needs
    the gradient. (What could be run with those B can be run without: fewer actions wait, and for less.)"""
    kinds = [backward_kinds(problem, stage.index, split) for stage in problem.layout.stages]
    return tuple(
        tuple(
            done
            for action in row
            for done in (
                [Action(kind, action.stage, action.microbatches) for kind in kinds[action.stage]]
                if action.kind is Kind.B
                else [action]
            )
        )
        for row in order
    )


def _round_the_ring(layout: Layout, num_microbatches: int, laps: int, rule: _RowRule, name: str) -> ComputeOrder:
    rings = layout.rings(laps)
    if rings is None:
        kind = "a U" if laps == 1 else f"a U of {laps} laps"
        raise ScheduleError(f"the {name} order is defined for {kind}; plan another layout with one_f_one_b or gpipe")
    rows: list[list[Action]] = [[] for _ in range(layout.num_ranks)]
    edge: list[list[Action]] = []
    for domain, ring in enumerate(rings):
        members = [m for m in range(num_microbatches) if layout.domain(m) == domain]
        for place, rank in enumerate(ring):
            row = [
                Action(action.kind, action.stage, (members[action.microbatches[0]],))
                for action in rule(place, len(ring), len(members))
            ]
            if place:
                rows[rank] = row
            else:
                edge.append(row)
    rows[EDGE_RANK] = [action for together in zip_longest(*edge) for action in together if action is not None]
    return tuple(map(tuple, rows))


_RULES: dict[str, Callable[[Layout, int], ComputeOrder]] = {
    "ldt_1f1b": ldt_1f1b,
    "ldt_2lap_1f1b": ldt_2lap_1f1b,
    "one_f_one_b": one_f_one_b,
}
