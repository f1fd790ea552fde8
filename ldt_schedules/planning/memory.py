"""How much a rank holds, in the unit of `Costs.memory`.

    start of F   + memory                 end of I   - (memory - memory_w)
    end of B     - memory                 end of W   - memory_w

What ends at the moment when something else starts is freed first. A stage that has no backward keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.costs import Costs
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.timeline import Span, Timeline, stages_backward

_DIGITS = 9
"""Times that agree to so many digits are one moment."""


def peak_memory(timeline: Timeline, costs: Costs) -> tuple[float, ...]:
    """The most each rank holds at one time; 0 for an evaluation, which keeps nothing."""
    return tuple(_peak(row, costs) for row in timeline.rows)


def fits(peaks: Sequence[float], problem: Problem) -> bool:
    """Does every rank keep within what it may hold?"""
    return all(problem.allows(rank, peak) for rank, peak in enumerate(peaks))


def change(action: Action, costs: Costs) -> float:
    """What the action adds to (F, at its start) or takes from (B, I, W, at its end) what its rank holds, if its stage has
    a backward."""
    held = costs.held(action.stage)
    if action.kind is Kind.F:
        one = held
    elif action.kind is Kind.B:
        one = -held
    else:
        kept = costs.held_after_input_grad(action.stage)
        one = -kept if action.kind is Kind.W else kept - held
    return one * len(action.microbatches)


def first_excess(row: Iterable[Action], problem: Problem, rank: int) -> tuple[int, float] | None:
    """(index, held) of the first action of a row at which the rank holds more than it may; None: it never does.

    One computation at a time, so the order of the row is the order of the changes.
    """
    held = 0.0
    for index, action in enumerate(row):
        if action.kind.is_compute and problem.layout.has_backward(action.stage):
            held += change(action, problem.costs)
            if not problem.allows(rank, held):
                return index, held
    return None


def _peak(row: Sequence[Span], costs: Costs) -> float:
    keeping = stages_backward(row)
    changes: list[tuple[float, int, float]] = []
    known: dict[tuple[Kind, int, int], float] = {}
    for span in row:
        action = span.action
        if action.stage not in keeping:
            continue
        key = (action.kind, action.stage, len(action.microbatches))
        if key not in known:
            known[key] = change(action, costs)
        if action.kind is Kind.F:
            changes.append((round(span.start, _DIGITS), 1, known[key]))
        else:
            changes.append((round(span.end, _DIGITS), 0, known[key]))
    held = peak = 0.0
    for _, _, amount in sorted(changes):
        held += amount
        peak = max(peak, held)
    return round(peak, _DIGITS)
