"""Plans near the proven limit: `auto` (fused backwards) and `auto_zb` (input and weight gradients apart).

    1. list-schedule by the published order and by first guesses (`priorities`); stop at once where a bound is met
    2. justify the best of them (`improvement`)
    3. long steps: plan a short step thoroughly and repeat its middle
    4. shake
    5. compare with the published order, if that fits into the memory: never return anything worse

Cost: a fixed number of instances is scheduled, at 2 to 5 microseconds each; of a step that is too long for that, a
fixed number of passes.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.bounds import lower_bounds
from ldt_schedules.planning.bulk import many_objects
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.memory import first_excess, fits, peak_memory
from ldt_schedules.planning.planners.improvement import BOUND_REACHED, Search, repeated
from ldt_schedules.planning.planners.list_scheduling import Plan, Targets
from ldt_schedules.planning.planners.priorities import seeds
from ldt_schedules.planning.planners.published import published, with_backwards
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.simulator import simulate
from ldt_schedules.planning.table import ComputeOrder
from ldt_schedules.planning.work_graph import WorkGraph, work_graph

EFFORT = 400_000
"""Instances that one plan may schedule: about 1.5 s."""

_SEED_SHARE, _SHORT_SHARE = 0.35, 0.3
_JUSTIFIED = 6
_ROUNDS = 6
_HUGE = 10  # a step is huge when fewer passes than this are affordable
_HUGE_TOLERANCE = 0.004
_FEWEST_SEEDS = 2
_SHORT_LIMIT = 16


def auto(problem: Problem, effort: int = EFFORT) -> ComputeOrder:
    """The best order we can find with every backward in one piece, where stages allow that."""
    with many_objects():
        return _plan(problem, False, effort)


def auto_zb(problem: Problem, effort: int = EFFORT) -> ComputeOrder:
    """The best order with input and weight gradients apart (zero bubble, Qi et al., arXiv:2401.10241)."""
    with many_objects():
        return _plan(problem, True, effort)


def _plan(problem: Problem, split: bool, effort: int) -> ComputeOrder:
    bound = lower_bounds(problem, split).best
    known = with_backwards(problem, published(problem), split)
    timeline = simulate(problem.layout, known, problem.costs)
    known_fits = fits(peak_memory(timeline, problem.costs), problem)
    if known_fits and timeline.makespan <= bound * (1 + BOUND_REACHED):
        return known
    graph = work_graph(problem, split)
    found = _search(problem, graph, bound, effort, known)
    if found is None:
        return known if known_fits else _one_at_a_time(problem, graph)
    return known if known_fits and timeline.makespan <= found.makespan else graph.order(found.starts)


def _search(
    problem: Problem, graph: WorkGraph, bound: float, effort: int, known: ComputeOrder | None = None
) -> Plan | None:
    size = graph.num_instances
    huge = size * _HUGE > effort
    search = Search(problem, graph, bound, _HUGE_TOLERANCE if huge else BOUND_REACHED)
    plans: list[Plan | None] = []
    short = _short_step(problem, graph)
    if huge and short is not None:  # passes over the long step are dear, those over the short one are not
        plans += _from_short_step(search, problem, short, graph, effort)
    if known and not search.done:
        plans.append(search.try_targets(_targets_of(graph, known)))
    if huge:
        _justify_best(search, plans, 1)
    enough = search.effort + (_FEWEST_SEEDS * size if huge else int(_SEED_SHARE * effort))
    for targets, rules in seeds(graph):
        if search.done or search.effort >= enough:
            break
        plans.append(search.try_targets(targets, rules))
    _justify_best(search, plans, 1 if huge else _JUSTIFIED)
    if not huge and short is not None and not search.done:
        share = int(_SHORT_SHARE * effort)
        _justify_best(search, _from_short_step(search, problem, short, graph, share), _JUSTIFIED)
    if not huge:
        search.shake(int((1 - _SEED_SHARE - _SHORT_SHARE) * effort))
    return search.best


def _justify_best(search: Search, plans: list[Plan | None], count: int) -> None:
    there = sorted((plan for plan in plans if plan is not None), key=lambda plan: plan.makespan)
    for plan in there[:count]:
        if not search.done:
            search.justify(plan, 3 if count == 1 else _ROUNDS)


def _from_short_step(
    search: Search, problem: Problem, num_microbatches: int, graph: WorkGraph, effort: int
) -> list[Plan | None]:
    """Schedules whose middle repeats that of a thorough plan for fewer microbatches."""
    small = replace(problem, num_microbatches=num_microbatches)
    bound = lower_bounds(small, graph.split).best
    plan = _search(small, work_graph(small, graph.split), bound, effort)
    plans: list[Plan | None] = []
    if plan is not None:
        for targets in repeated(plan, [len(work.durations) for work in graph.works]):
            if search.done:
                break
            plans.append(search.try_targets(targets))
    return plans


def _short_step(problem: Problem, graph: WorkGraph) -> int | None:
    """Microbatches of a step that is just long enough to have a steady state; None when this one is not much longer.

    The pipeline is full once a round trip's worth of the busiest rank's work is under way.
    """
    domains = problem.layout.num_domains
    if not problem.is_uniform or problem.layout.domain_of or problem.num_microbatches % domains:
        return None
    ends: list[float] = []
    for index, work in enumerate(graph.works):
        into = (ends[arc.source] + arc.delay for arc in graph.into[index])
        ends.append(max(into, default=0.0) + work.durations[0])
    load = [0.0] * graph.num_ranks
    for work in graph.works:
        load[work.rank] += work.durations[0]
    filling = math.ceil(max(ends) / max(load)) if max(load) > 0 else 1
    per_domain = 2 * filling + 4
    if len(graph.works) * _SHORT_LIMIT < 4000:
        per_domain = min(per_domain, max(_SHORT_LIMIT, filling + 4))
    count = per_domain * domains
    return count if problem.num_microbatches >= 1.5 * count else None


def _targets_of(graph: WorkGraph, order: ComputeOrder) -> Targets:
    """Positions in an order as targets."""
    place = {(a.kind, a.stage, a.microbatches[0]): float(i) for row in order for i, a in enumerate(row)}
    return [[place[work.kind, work.stage, m] for m in work.microbatches] for work in graph.works]


def _one_at_a_time(problem: Problem, graph: WorkGraph) -> ComputeOrder:
    """One microbatch after the other: slow, and possible with whatever memory a single one needs.

    Raises:
        ScheduleError: not even that fits, because stages on one rank must be held together that neither feeds.
    """
    rows: list[list[Action]] = [[] for _ in range(graph.num_ranks)]
    serial = _backward_first(graph)
    for m in range(problem.num_microbatches):
        for index in serial:
            work = graph.works[index]
            if m in work.microbatches:
                rows[work.rank].append(Action(work.kind, work.stage, (m,)))
    order = tuple(map(tuple, rows))
    for rank, row in enumerate(order):
        excess = first_excess(row, problem, rank)
        if excess is not None:
            raise ScheduleError(
                f"no order was found within the memory of rank {rank}: it may hold {problem.cap(rank):g}, and one "
                f"microbatch after the other needs {excess[1]:g} there; give rank {rank} at least {excess[1]:g}"
            )
    return order


def _backward_first(graph: WorkGraph) -> list[int]:
    """The works one after the other, each after what it needs; whatever frees memory goes before what takes some."""
    order: list[int] = []
    left = set(range(len(graph.works)))
    while left:
        ready = [w for w in left if not any(arc.source in left for arc in graph.into[w])]
        chosen = min(ready, key=lambda w: (graph.works[w].takes > 0, -w))
        order.append(chosen)
        left.remove(chosen)
    return order
