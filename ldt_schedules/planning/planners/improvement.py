"""From a good schedule to a better one, by list scheduling again with other targets.

Justification (forward-backward improvement, Valls et al. 2005): run time backwards, each instance as urgent as it ended
late; then forwards, each as urgent as it then started early. Gaps close from both sides, and ranks learn to wait.

    schedule ──mirror──► backwards ──mirror──► forwards ──► ...          as long as it helps

Shaking: add noise to the starts, schedule by them, justify, keep what is not worse. Noise that repeats every q
microbatches changes the pattern of the steady state; noise that does not changes its ends.

Repeating: plan few microbatches thoroughly, then repeat the middle of that plan for as many as wanted.

All of it is deterministic: the random numbers have a fixed seed, and the effort is counted in instances, not seconds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from ldt_schedules.planning.planners.list_scheduling import RULES, ListScheduler, Plan, Rules, Targets
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.simulator import simulate
from ldt_schedules.planning.work_graph import WorkGraph

BOUND_REACHED = 1e-9
"""A makespan this close (relative) to its bound is optimal: nothing is left to look for."""

_MORE_THAN_NOISE = 1e-9
_NOISE_LENGTHS = (0.3, 1.0, 2.0, 4.0)
_PERIODS = (0, 0, 1, 2, 3, 4)
_STRETCHES = (0.15, 0.3, 1.0, 2.0)  # of the step's length
_STALE = 60
_ACCEPT_WORSE = 0.002
_RESERVING = 0.5
_PATIENCE = (0.0, 0.5, 1.0)


@dataclass
class Search:
    """Schedules of one graph; `best` is the best so far, `effort` how many instances have been scheduled."""

    problem: Problem
    graph: WorkGraph
    bound: float
    tolerance: float = BOUND_REACHED
    effort: int = 0
    best: Plan | None = None
    forward: ListScheduler = field(init=False)
    backward: ListScheduler = field(init=False)

    def __post_init__(self) -> None:
        self.forward = ListScheduler(self.graph)
        self.backward = ListScheduler(self.graph.reversed())
        self.queues = self.graph.num_resources > 0

    @property
    def done(self) -> bool:
        """Is the best schedule within the tolerance of the bound?"""
        return self.best is not None and self.best.makespan <= self.bound * (1 + self.tolerance)

    def try_targets(self, targets: Targets, rules: Rules = RULES) -> Plan | None:
        """List-schedule by `targets`; remembers the result if it is the best."""
        self.effort += self.graph.num_instances
        plan = self._timed(self.forward.run(targets, rules))
        self._remember(plan)
        return plan

    def _timed(self, plan: Plan | None) -> Plan | None:
        """The plan with the simulator's times where messages queue: of two that are made at one moment it may let the
        other one go first."""
        if plan is None or not self.queues:
            return plan
        self.effort += 3 * self.graph.num_instances
        timeline = simulate(self.problem.layout, self.graph.order(plan.starts), self.problem.costs)
        spans = {(span.action.kind, span.action.stage, span.action.microbatches[0]): span for span in timeline.spans}
        of_work = [[spans[work.kind, work.stage, m] for m in work.microbatches] for work in self.graph.works]
        return Plan(
            [[span.start for span in row] for row in of_work],
            [[span.end for span in row] for row in of_work],
            timeline.makespan,
        )

    def justify(self, plan: Plan, rounds: int, rules: Rules = RULES) -> Plan:
        """The best of `rounds` backward and forward passes, `plan` included."""
        best = current = plan
        for _ in range(rounds):
            if self.done:
                break
            self.effort += self.graph.num_instances
            back = self.backward.run(_mirrored(current), rules)
            if back is None:
                break
            turned = _turned(back)
            if not self.queues:  # the backward pass knows no wires: with queues its times are not to be had
                self._remember(turned)
                best = min(best, turned, key=_makespan)
            again = self.try_targets(turned.starts, rules)
            if again is None or again.makespan >= current.makespan - _MORE_THAN_NOISE:
                break
            best, current = min(best, again, key=_makespan), again
        return best

    def shake(self, effort: int) -> None:
        """Perturb the best schedule until so many more instances are scheduled, or nothing can be better."""
        rng = random.Random(0)
        until, stale = self.effort + effort, 0
        current = self.best
        works = self.graph.works
        mean = sum(sum(work.durations) for work in works) / max(1, self.graph.num_instances)
        while self.effort < until and not self.done and current is not None and self.best is not None:
            known = self.best.makespan
            noise = _noise(rng, current, mean * rng.choice(_NOISE_LENGTHS), rng.choice(_PERIODS))
            rules = Rules(reserve=rng.random() < _RESERVING, patience=rng.choice(_PATIENCE))
            plan = self.try_targets(noise, rules)
            if plan is None:
                continue
            plan = self.justify(plan, 2, rules)
            worst = current.makespan * (1 + _ACCEPT_WORSE * rng.random() ** 2) + _MORE_THAN_NOISE
            if plan.makespan <= worst:
                current = plan
            stale = 0 if self.best.makespan < known - _MORE_THAN_NOISE else stale + 1
            if stale > _STALE:
                current, stale = self.best, 0

    def _remember(self, plan: Plan | None) -> None:
        if plan is not None and (self.best is None or plan.makespan < self.best.makespan - _MORE_THAN_NOISE):
            self.best = plan


def _makespan(plan: Plan) -> float:
    return plan.makespan


def _mirrored(plan: Plan) -> Targets:
    """Targets for time running backwards: what ended last comes first."""
    return [[plan.makespan - end for end in reversed(ends)] for ends in plan.ends]


def _turned(back: Plan) -> Plan:
    """A schedule of the reversed graph as one of the graph itself."""
    length = back.makespan
    return Plan(
        [[length - end for end in reversed(ends)] for ends in back.ends],
        [[length - start for start in reversed(starts)] for starts in back.starts],
        length,
    )


def _noise(rng: random.Random, plan: Plan, length: float, period: int) -> Targets:
    """The starts of a plan, shaken: in a repeating pattern, or (period 0) here and there within a stretch of the step."""
    if period:
        offsets = [[rng.gauss(0, length) for _ in range(period)] for _ in plan.starts]
        return [
            [start + offset[k % period] for k, start in enumerate(starts)]
            for starts, offset in zip(plan.starts, offsets, strict=True)
        ]
    width = plan.makespan * rng.choice(_STRETCHES)
    first = rng.uniform(-width / 2, plan.makespan - width / 2)
    return [
        [start + rng.gauss(0, length) if first <= start <= first + width else start for start in starts]
        for starts in plan.starts
    ]


def repeated(short: Plan, counts: list[int], max_period: int = 4) -> Iterator[Targets]:
    """Targets for `counts[w]` instances of each work: `short` with its middle repeated, q microbatches at a time."""
    shortest = min(len(starts) for starts in short.starts)
    for q in range(1, max_period + 1):
        if shortest <= q:
            return
        lengths = sorted(row[(len(row) - q) // 2 + q] - row[(len(row) - q) // 2] for row in short.starts)
        period = lengths[len(lengths) // 2]
        targets = []
        for starts, count in zip(short.starts, counts, strict=True):
            middle = (len(starts) - q) // 2
            longer = list(starts[: middle + q])
            extra = count - len(starts)
            for _ in range(extra):
                longer.append(longer[-q] + period)
            targets.append(longer + [start + period * extra / q for start in starts[middle + q :]])
        yield targets
