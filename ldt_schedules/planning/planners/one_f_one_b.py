"""One forward, one backward, on any layout (PipeDream-Flush: Narayanan et al., arXiv:2006.09503).

A stage that is d stages away from the loss keeps d + 1 microbatches in flight: as many as it takes until the first
gradient is back, when all stages are equally long and messages are free. Then every backward makes room for a forward.

    chain of 3     rank 0   F0 F1 F2 ·  ·  B0 F3 B1 ...
                   rank 1   ·  F0 F1 ·  B0 F2 B1 ...
                   rank 2   ·  ·  F0 B0 F1 B1 ...

The order is found by playing it with such lengths. Frozen stages are played as if they were trained, and what they do not
need is left out afterwards (`with_backwards`): so beside other stages of their rank they keep step instead of running
ahead, and the step is never longer than with nothing frozen.

Where layouts agree it is the order of the books; on a U it is close to `ldt_1f1b`, on other layouts it is what memory
budgets are measured against.
"""

from __future__ import annotations

from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.costs import Costs
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.planners.list_scheduling import ListScheduler, Rules
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.table import ComputeOrder
from ldt_schedules.planning.work_graph import work_graph


def one_f_one_b(layout: Layout, num_microbatches: int) -> ComputeOrder:
    """Works for every layout."""
    away = _stages_to_loss(layout)
    graph = work_graph(Problem(layout.freeze(()), num_microbatches, Costs()), split=False)
    targets = [
        [(0.0 if work.kind is not Kind.F else 1.0) + away[work.stage] / (2 * len(away)) + 1e-9 * m
         for m in work.microbatches]
        for work in graph.works
    ]  # fmt: skip
    plan = ListScheduler(graph).run(targets, Rules(room=tuple(away[work.stage] + 1.0 for work in graph.works)))
    assert plan is not None  # without caps nothing is held in a circle
    return graph.order(plan.starts)


def _stages_to_loss(layout: Layout) -> list[int]:
    """For each stage, how many stages the longest way to a loss has after it."""
    away = [0] * len(layout.stages)
    for stage in reversed(layout.forward_order):
        away[stage] = max((away[consumer] + 1 for consumer in layout.consumers(stage)), default=0)
    return away
