"""Optimal orders of small problems, proven by constraint programming (CP-SAT of OR-tools, the extra `exact`).

Heuristics and bounds of our own can share a mistake. This planner shares nothing with them but the work graph: it is
what both are measured against, and for steps of up to about 200 actions it is good enough to be used.

    start of every instance    a variable
    a rank, a wire             one interval at a time                (no-overlap)
    a message                  leaves after its maker's end, is there a transmission and a latency later
    memory of a rank           each amount is held from the start of F to the end of what frees it     (cumulative)
    equal microbatches         instances of one work in their order  (they can be relabelled: nothing is lost)

CP-SAT counts in whole numbers. Times that are multiples of some unit (no finer than 2**-30 of the step) are counted in
that unit, exactly. Other times are rounded *down* to 2**-30 of the step: with all starts rounded down too, every schedule
stays one, so that what CP-SAT proves is below the true optimum, by a few parts in 10**9 for each action of a chain. Odd
numbers make the search much slower: then give a hint, or round the costs. Memory is treated alike, in steps of 2**-20 of
a cap; should the order found not fit into the true memory because of that, amounts are rounded up and it is planned once
more, for the order only. The order found is simulated with the true times.

Finite bandwidth: messages leave in the order of their making, as in `simulator`; two that are made in one instant may
leave in any order. A computation may also be delayed here so that its message leaves later, which the simulator never
does. Both can only make the bound lower: it stays true, but may not be reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from types import ModuleType
from typing import Any

from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.memory import fits, peak_memory
from ldt_schedules.planning.problem import MEMORY_SLACK, Problem
from ldt_schedules.planning.simulator import simulate
from ldt_schedules.planning.table import ComputeOrder
from ldt_schedules.planning.timeline import Timeline
from ldt_schedules.planning.work_graph import Arc, WorkGraph, work_graph

ROUNDING = 1e-6
"""An order this close (relative) to its bound is optimal: what rounding and sums of floats may cost, and no more."""

_TIME_STEPS = 2**30
_MEMORY_STEPS = 2**20
_LARGEST_DENOMINATOR = 10_000


@dataclass(frozen=True, slots=True)
class ExactPlan:
    """An order, the time it takes in a simulation, and a time that no order of this form beats."""

    order: ComputeOrder
    makespan: float
    lower_bound: float

    @property
    def is_optimal(self) -> bool:
        """Is it proven that nothing is better, but for `ROUNDING`?"""
        return self.makespan <= self.lower_bound * (1 + ROUNDING)


def exact(
    problem: Problem, split: bool, time_limit_s: float, hint: ComputeOrder | None = None, num_workers: int = 1
) -> ExactPlan:
    """The best order that is found in the time, with a proven bound.

    The bound holds for orders in which every backward has the form that `work_graph(problem, split)` gives it.

    Args:
        time_limit_s: of the search; building the model comes on top, and so does the rare second search (see above).
        hint: an order to start from. The result is never worse, as long as the hint keeps to the memory.
        num_workers: threads; with one, equal input gives equal output unless the time runs out.

    Raises:
        ScheduleError: OR-tools is not installed, nothing was found in the time, no order fits into the memory, a hint
            that is not an order of this problem.
    """
    cp = _cp_model()
    if not time_limit_s > 0:
        raise ScheduleError(f"the time limit of an exact plan must be more than 0 s, got {time_limit_s}")
    graph = work_graph(problem, split)
    known = None if hint is None else _known(problem, graph, hint)
    found = [] if known is None or hint is None or not _fits(problem, known) else [(known.makespan, hint)]
    bound = 0.0
    for rounding in (math.floor, math.ceil):
        model = _Model(cp, problem, graph, rounding)
        if known is not None:
            model.hint(known, limit=bool(found))
        order, proven = model.solve(time_limit_s, num_workers)
        if rounding is math.floor:
            bound = proven
        if order is None:
            break
        timeline = simulate(problem.layout, order, problem.costs)
        if _fits(problem, timeline):
            found.append((timeline.makespan, order))
            break
    if not found:
        raise ScheduleError(
            f"no order was found within {time_limit_s:g} s for {graph.num_instances} actions; give more time, or an "
            "order to start from"
        )
    makespan, order = min(found, key=lambda entry: entry[0])
    return ExactPlan(order, makespan, min(bound, makespan))


def _cp_model() -> ModuleType:
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        raise ScheduleError("exact plans need OR-tools: pip install 'ldt-schedules[exact]'") from None
    return cp_model


def _known(problem: Problem, graph: WorkGraph, hint: ComputeOrder) -> Timeline:
    """The timeline of a hint."""
    wanted = {(w.rank, Action(w.kind, w.stage, (m,))) for w in graph.works for m in w.microbatches}
    given = [(rank, action) for rank, row in enumerate(hint) for action in row]
    if len(given) != len(wanted) or set(given) != wanted:
        differs = sorted(f"{action} on rank {rank}" for rank, action in set(given) ^ wanted)
        raise ScheduleError(
            f"the hint has {len(given)} actions, the problem {len(wanted)}; they differ in "
            f"{', '.join(differs[:3]) or 'how often they stand'}"
        )
    return simulate(problem.layout, hint, problem.costs)


def _fits(problem: Problem, timeline: Timeline) -> bool:
    return fits(peak_memory(timeline, problem.costs), problem)


class _Model:
    """The variables and constraints for one graph.

    `steps` is how many steps of the model one unit of time has. `rounding` is of amounts of memory.
    """

    def __init__(self, cp: ModuleType, problem: Problem, graph: WorkGraph, rounding: Callable[[Fraction], int]) -> None:
        self.cp, self.rounding, self.uniform = cp, rounding, problem.is_uniform
        values = [time for work in graph.works for time in work.durations]
        for work, arcs in zip(graph.works, graph.into, strict=True):
            values += [time for arc in arcs for time in (arc.latency, arc.transmission) for _ in work.durations]
        self.steps, self.is_exact = _steps(values, sum(map(_fraction, values)), _TIME_STEPS)
        self.graph = self._in_steps(graph)
        self.horizon = sum(self._down(value) for value in values)  # everything one after the other
        self.model: Any = cp.CpModel()
        self.starts = [
            [self.model.new_int_var(0, self.horizon, f"start_{w}_{k}") for k in range(len(work.durations))]
            for w, work in enumerate(self.graph.works)
        ]
        self.ends = [
            [start + int(duration) for start, duration in zip(starts, work.durations, strict=True)]
            for starts, work in zip(self.starts, self.graph.works, strict=True)
        ]
        self.makespan = self.model.new_int_var(0, self.horizon, "makespan")
        self._add_ranks()
        self._add_arcs()
        for rank, cap in enumerate(graph.caps):
            if math.isfinite(cap):
                self._add_memory(rank, cap)
        self.model.add_max_equality(self.makespan, [end for ends in self.ends for end in ends])
        self.model.minimize(self.makespan)

    def hint(self, known: Timeline, limit: bool) -> None:
        """Start from a timeline; with `limit` nothing longer is looked at."""
        of: dict[tuple[object, int], list[tuple[int, int]]] = {}
        for span in known.spans:
            (m,) = span.action.microbatches
            start = math.floor(_fraction(span.start) * self.steps + Fraction(1, 1000))
            of.setdefault((span.action.kind, span.action.stage), []).append((m, start))
        for work, starts in zip(self.graph.works, self.starts, strict=True):
            mine = [(m, start) for m, start in sorted(of[work.kind, work.stage]) if m in work.microbatches]
            times = [start for _, start in mine]
            for variable, time in zip(starts, sorted(times) if self.uniform else times, strict=True):
                self.model.add_hint(variable, time)
        if limit:
            self.model.add(self.makespan <= math.floor(_fraction(known.makespan) * self.steps) + 1)

    def solve(self, time_limit_s: float, num_workers: int) -> tuple[ComputeOrder | None, float]:
        """The best order in the time, if any, and what is proven. Raises ScheduleError when there is no order at all."""
        cp = self.cp
        solver = cp.CpSolver()
        solver.parameters.max_time_in_seconds = time_limit_s
        solver.parameters.num_workers = num_workers
        status = solver.solve(self.model)
        assert status != cp.MODEL_INVALID, self.model.validate()
        if status == cp.INFEASIBLE:
            if self.rounding is math.ceil:
                return None, 0.0
            caps = ", ".join(f"rank {rank} {cap:g}" for rank, cap in enumerate(self.graph.caps) if math.isfinite(cap))
            raise ScheduleError(f"no order fits into the memory ({caps}); give more")
        bound = float(max(0, math.ceil(solver.best_objective_bound - 1e-3)) / self.steps)
        if status == cp.UNKNOWN:
            return None, bound
        return self.graph.order([[solver.value(start) for start in row] for row in self.starts]), bound

    def _down(self, time: float) -> int:
        return math.floor(_fraction(time) * self.steps)

    def _in_steps(self, graph: WorkGraph) -> WorkGraph:
        """The same graph with whole numbers for all times."""

        def arcs(of: tuple[tuple[Arc, ...], ...]) -> tuple[tuple[Arc, ...], ...]:
            return tuple(
                tuple(
                    replace(arc, latency=self._down(arc.latency), transmission=self._down(arc.transmission))
                    for arc in row
                )
                for row in of
            )

        works = tuple(replace(work, durations=tuple(map(self._down, work.durations))) for work in graph.works)
        return replace(graph, works=works, into=arcs(graph.into), out=arcs(graph.out))

    def _add_ranks(self) -> None:
        intervals: list[list[Any]] = [[] for _ in range(self.graph.num_ranks)]
        for work, starts, ends in zip(self.graph.works, self.starts, self.ends, strict=True):
            for start, duration in zip(starts, work.durations, strict=True):
                intervals[work.rank].append(self.model.new_fixed_size_interval_var(start, int(duration), ""))
            if self.uniform:
                self._in_order(starts, ends)
        for row in intervals:
            self.model.add_no_overlap(row)

    def _in_order(self, starts: Sequence[Any], ends: Sequence[Any]) -> None:
        for end, start in zip(ends, starts[1:], strict=False):
            self.model.add(start >= end)

    def _add_arcs(self) -> None:
        """What instances need of others, over wires where there are any."""
        wires: list[list[tuple[Any, Any, int]]] = [[] for _ in range(self.graph.num_resources)]
        for arc in (arc for arcs in self.graph.into for arc in arcs):
            leaves = self.ends[arc.source]
            if arc.resource >= 0:
                sending = int(arc.transmission)
                wired = [self.model.new_int_var(0, self.horizon, "") for _ in leaves]
                for made, start in zip(leaves, wired, strict=True):
                    self.model.add(start >= made)
                    wires[arc.resource].append((made, start, sending))
                leaves = [start + sending for start in wired]
                if self.uniform:
                    self._in_order(wired, leaves)
            for left, needed in zip(leaves, self.starts[arc.target], strict=True):
                self.model.add(needed >= left + int(arc.latency))
        for messages in wires:
            self._add_wire(messages)

    def _add_wire(self, messages: Sequence[tuple[Any, Any, int]]) -> None:
        """One message at a time; first made, first sent, as far as that can be told."""
        model, blur = self.model, 0 if self.is_exact else 1
        model.add_no_overlap([model.new_fixed_size_interval_var(start, size, "") for _, start, size in messages])
        for (made, start, size), (made_b, start_b, size_b) in combinations(messages, 2):
            first = model.new_bool_var("")
            model.add(start + size <= start_b).only_enforce_if(first)
            model.add(made <= made_b + blur).only_enforce_if(first)
            model.add(start_b + size_b <= start).only_enforce_if(~first)
            model.add(made_b <= made + blur).only_enforce_if(~first)

    def _add_memory(self, rank: int, cap: float) -> None:
        """What an instance frees at its end was held since the start of its stage's F."""
        works = self.graph.works
        opening = {(work.stage, work.domain): w for w, work in enumerate(works) if work.takes > 0}
        closing = [w for w in self.graph.works_on(rank) if works[w].frees > 0]
        room = _fraction(cap) + _fraction(MEMORY_SLACK)
        held = [works[w].frees for w in closing for _ in works[w].durations]
        if sum(map(_fraction, held)) <= room:
            return
        steps, _ = _steps(held, room, _MEMORY_STEPS)
        intervals, amounts = [], []
        for w in closing:
            amount = self.rounding(_fraction(works[w].frees) * steps)
            for start, end in zip(self.starts[opening[works[w].stage, works[w].domain]], self.ends[w], strict=True):
                time = self.model.new_int_var(0, self.horizon, "")
                intervals.append(self.model.new_interval_var(start, time, end, ""))
                amounts.append(amount)
        self.model.add_cumulative(intervals, amounts, math.floor(room * steps))


def _fraction(value: float) -> Fraction:
    """The simple fraction that a float stands for (1/3), else the decimal number (0.37219)."""
    simple = Fraction(value).limit_denominator(_LARGEST_DENOMINATOR)
    return simple if float(simple) == value else Fraction(repr(float(value)))


def _steps(values: Iterable[float], most: Fraction | int, limit: int) -> tuple[Fraction, bool]:
    """How many steps 1.0 has so that all values are whole and `most` has no more than `limit`; else, so many that `most`
    has just `limit` (False: values must be rounded)."""
    fractions = {_fraction(value) for value in values if value > 0}
    if not fractions:
        return Fraction(1), True
    common = math.lcm(*(f.denominator for f in fractions))
    steps = Fraction(common, math.gcd(*(int(f * common) for f in fractions)))
    return (steps, True) if most * steps <= limit else (Fraction(limit) / most, False)
