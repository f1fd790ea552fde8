"""What a plan is worth: its times, its memory, its distance to the proven limit, and what would help."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.bounds import Bounds, lower_bounds
from ldt_schedules.planning.budgets import COMPARED, within_budget
from ldt_schedules.planning.dependencies import Dataflow
from ldt_schedules.planning.layout import EDGE_RANK
from ldt_schedules.planning.memory import fits, peak_memory
from ldt_schedules.planning.planners import planner
from ldt_schedules.planning.planners.priorities import holding_time
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.simulator import simulate
from ldt_schedules.planning.table import ComputeOrder, is_split
from ldt_schedules.planning.timeline import Timeline
from ldt_schedules.planning.work_graph import work_graph


@dataclass(frozen=True)
class Evaluation:
    """One order on one problem. `rate_up`, `rate_down` are the sizes that leave and reach the edge, per time: what the
    link must carry on average; `fits` says whether the order keeps the problem's memory caps."""

    name: str
    order: ComputeOrder
    timeline: Timeline
    bounds: Bounds
    peaks: tuple[float, ...]
    fits: bool
    rate_up: float
    rate_down: float

    @property
    def makespan(self) -> float:
        return self.timeline.makespan

    @property
    def distance(self) -> float:
        """Makespan over the proven lower bound, 1 at best."""
        return _distance(self.makespan, self.bounds.best)


def _distance(makespan: float, bound: float) -> float:
    return makespan / bound if bound else 1.0


def evaluate(name: str, problem: Problem, order: ComputeOrder) -> Evaluation:
    """Play `order` (or the rows of a table) on the problem."""
    timeline = simulate(problem.layout, order, problem.costs)
    peaks = peak_memory(timeline, problem.costs)
    flow = Dataflow(problem.layout)
    carried: dict[bool, float] = defaultdict(float)
    for transfer in timeline.transfers:
        if EDGE_RANK in (transfer.sender, transfer.receiver):
            (value,) = flow.takes(transfer.send)
            carried[transfer.sender == EDGE_RANK] += problem.costs.size(*value.edge)
    length = timeline.makespan or 1.0
    return Evaluation(
        name=name,
        order=order,
        timeline=timeline,
        bounds=lower_bounds(problem, is_split(order)),
        peaks=peaks,
        fits=fits(peaks, problem),
        rate_up=carried[True] / length,
        rate_down=carried[False] / length,
    )


def plan_and_evaluate(name: str, problem: Problem) -> Evaluation:
    """Plan with one planner. Raises ScheduleError as the planner does."""
    return evaluate(name, problem, planner(name)(problem))


@dataclass(frozen=True, slots=True)
class Worth:
    """What a budget would buy: the step with it and the memory that takes."""

    budget: str
    makespan: float
    bound: float
    peaks: tuple[float, ...]

    @property
    def distance(self) -> float:
        """As `Evaluation.distance`."""
        return _distance(self.makespan, self.bound)


def worth_of_memory(name: str, problem: Problem, budgets: tuple[str, ...] = COMPARED) -> list[Worth]:
    """The same planner under several budgets (those that the problem's own caps do not cut down to one and the same).

    A plan for less memory is a plan for more, so no entry is slower than one with smaller caps.
    """
    known: dict[tuple[float | None, ...], Evaluation] = {}
    worth = []
    for budget in budgets:
        allowed = within_budget(problem, budget)
        found = known.get(allowed.memory_cap) or plan_and_evaluate(name, allowed)
        for other in known.values():
            if fits(other.peaks, allowed) and other.makespan < found.makespan:
                found = evaluate(name, allowed, other.order)
        known[allowed.memory_cap] = found
        worth.append(Worth(budget, found.makespan, found.bounds.best, found.peaks))
    return worth


@dataclass(frozen=True, slots=True)
class Depth:
    """Microbatches of one stage that must be in flight so that its rank never waits for the round trip: the shortest
    time that one is held, over the time between two microbatches of the busiest rank."""

    stage: int
    rank: int
    round_trip: float
    needed: int
    used: int


def depths(problem: Problem, evaluation: Evaluation) -> list[Depth]:
    """For each stage how many microbatches in flight hide the round trip, and how many this plan has. (What has no backward
    makes no round trip.)"""
    graph = work_graph(problem, is_split(evaluation.order))
    load = [0.0] * graph.num_ranks
    for work in graph.works:
        load[work.rank] += sum(work.durations)
    per_microbatch = max(load) / problem.num_microbatches * problem.layout.num_domains
    found = []
    for index, work in enumerate(graph.works):
        if work.kind is Kind.F and work.domain == 0 and problem.layout.has_backward(work.stage):
            trip = holding_time(graph, index)
            needed = math.ceil(trip / per_microbatch - 1e-9) if per_microbatch else 1
            used = evaluation.timeline.peak_of_stage(work.rank, work.stage)
            found.append(Depth(work.stage, work.rank, trip, needed, used))
    return sorted(found, key=lambda depth: depth.stage)
