"""How fast a step can be at best: bounds that no schedule beats.

Equal microbatches can be relabelled so that every stage serves them in order. Then, for the k-th instance of each work,

    head[w][k]   nobody can start it earlier:   its inputs' k-th instances, its own (k-1)-th instance, and with room
                 for C activations the release of the (k-C)-th must have ended
    tail[w][k]   this much must still follow its end: the same, looked at from behind

are longest paths. From them:

    path     the longest head + duration + tail
    rank     all work of a rank on one machine with heads and tails (Jackson's preemptive schedule, Carlier 1982)
    link     the same for the messages of a wire
    memory   every activation is held at least for its shortest round trip, and a rank holds no more than its cap:
             lead + sum(memory x holding time) / cap + trail

When microbatches differ they cannot be relabelled, and only the arcs within a microbatch count.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.problem import MEMORY_SLACK, Problem
from ldt_schedules.planning.work_graph import WorkGraph, work_graph

_EPS = 1e-9


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lower bounds on the makespan, each proven on its own; `per_rank[r]` is rank r's work with heads and tails."""

    path: float
    rank: float
    link: float
    memory: float
    per_rank: tuple[float, ...]

    @property
    def best(self) -> float:
        """The largest."""
        return max(self.path, self.rank, self.link, self.memory)

    @property
    def reason(self) -> str:
        """Which of the bounds is the largest."""
        return max(("path", "rank", "link", "memory"), key=lambda name: getattr(self, name))


@lru_cache(maxsize=16)
def lower_bounds(problem: Problem, split: bool) -> Bounds:
    """Bounds for tables with fused backwards, or (`split`) for those that may use I and W."""
    return _Bounding(problem, work_graph(problem, split)).bounds()


@dataclass(slots=True)
class _Node:
    """A work, or the passage of its message over a wire of finite bandwidth. `before` are (node, delay, shift)."""

    duration: float
    durations: tuple[float, ...]
    resource: tuple[str, int]
    before: list[tuple[int, float, int]]


class _Bounding:
    def __init__(self, problem: Problem, graph: WorkGraph) -> None:
        self.problem, self.graph = problem, graph
        self.uniform = problem.is_uniform
        self.jobs: dict[tuple[str, int], list[tuple[float, float, float]]] = defaultdict(list)
        self.path = 0.0
        self.area = [0.0] * graph.num_ranks
        self.lead = [math.inf] * graph.num_ranks
        self.trail = [math.inf] * graph.num_ranks

    def bounds(self) -> Bounds:
        for domain in sorted({work.domain for work in self.graph.works}):
            self._bound_domain(domain)
        value = {resource: one_machine(jobs) for resource, jobs in self.jobs.items()}
        per_rank = tuple(value.get(("rank", r), 0.0) for r in range(self.graph.num_ranks))
        memory = [
            self.lead[r] + self.area[r] / (self.graph.caps[r] + MEMORY_SLACK) + self.trail[r]
            for r in range(self.graph.num_ranks)
            if self.area[r] > 0
        ]
        return Bounds(
            path=self.path,
            rank=max(per_rank),
            link=max((v for (what, _), v in value.items() if what == "link"), default=0.0),
            memory=max(memory, default=0.0),
            per_rank=per_rank,
        )

    def _bound_domain(self, domain: int) -> None:
        nodes, node_of = self._nodes(domain)
        count = len(nodes[0].durations)
        heads, tails = self._heads(nodes, count), self._tails(nodes, count)
        for node, head, tail in zip(nodes, heads, tails, strict=True):
            self.path = max(self.path, *(sum(parts) for parts in zip(head, node.durations, tail, strict=True)))
            self.jobs[node.resource] += zip(head, node.durations, tail, strict=True)
        self._add_area(domain, nodes, node_of, heads, tails)

    def _nodes(self, domain: int) -> tuple[list[_Node], dict[int, int]]:
        """The works of a domain and their messages over wires, every node after what it needs."""
        nodes: list[_Node] = []
        node_of: dict[int, int] = {}
        for index, work in enumerate(self.graph.works):
            if work.domain != domain:
                continue
            before = []
            for arc in self.graph.into[index]:
                source = node_of[arc.source]
                if arc.resource >= 0:
                    times = (arc.transmission,) * len(work.durations)
                    nodes.append(_Node(arc.transmission, times, ("link", arc.resource), [(source, 0.0, 0)]))
                    source = len(nodes) - 1
                before.append((source, arc.latency, 0))
            node_of[index] = len(nodes)
            nodes.append(_Node(min(work.durations), work.durations, ("rank", work.rank), before))
        self._relax_split(nodes, node_of)
        if self.uniform:
            self._add_room(nodes, node_of)
        return nodes, node_of

    def _relax_split(self, nodes: list[_Node], node_of: dict[int, int]) -> None:
        """Where a stage may do B or I and W, each microbatch may choose: only what is true of both counts."""
        costs = self.problem.costs
        for index, node in node_of.items():
            work = self.graph.works[index]
            if work.kind not in (Kind.I, Kind.W) or not costs.can(Kind.B, work.stage):
                continue
            times = []
            for m in work.microbatches:
                fused, i, w = (costs.time(kind, work.stage, m) for kind in (Kind.B, Kind.I, Kind.W))
                first = min(i, fused)
                times.append(first if work.kind is Kind.I else max(0.0, min(i + w, fused) - first))
            nodes[node].durations, nodes[node].duration = tuple(times), min(times)

    def _add_room(self, nodes: list[_Node], node_of: dict[int, int]) -> None:
        """With room for C activations of a stage, its k-th F waits for the end of the (k-C)-th release."""
        forward = {self.graph.works[i].stage: n for i, n in node_of.items() if self.graph.works[i].kind is Kind.F}
        for index, node in node_of.items():
            work, cap = self.graph.works[index], self.graph.caps[self.graph.works[index].rank]
            if work.kind is Kind.F or math.isinf(cap):
                continue
            held = self.problem.costs.held(work.stage)
            kept = self.problem.costs.held_after_input_grad(work.stage)
            size = kept if work.kind is Kind.W else held
            if size > 0:
                nodes[forward[work.stage]].before.append((node, 0.0, int((cap + MEMORY_SLACK) / size + _EPS)))

    def _heads(self, nodes: list[_Node], count: int) -> list[list[float]]:
        heads = [[0.0] * count for _ in nodes]
        ends = [[0.0] * count for _ in nodes]
        steps = [(node.durations, [(ends[p], lag, shift) for p, lag, shift in node.before]) for node in nodes]
        for k in range(count):
            for j, (durations, before) in enumerate(steps):
                start = ends[j][k - 1] if k and self.uniform else 0.0
                for ended, lag, shift in before:
                    if k >= shift:
                        possible = ended[k - shift] + lag
                        if possible > start:
                            start = possible
                heads[j][k] = start
                ends[j][k] = start + durations[k]
        return heads

    def _tails(self, nodes: list[_Node], count: int) -> list[list[float]]:
        tails = [[0.0] * count for _ in nodes]
        steps = [
            (j, node.durations, [(tails[p], lag, shift) for p, lag, shift in node.before])
            for j, node in reversed(list(enumerate(nodes)))
        ]
        for k in range(count - 1, -1, -1):
            for j, durations, before in steps:
                tail, duration = tails[j][k], durations[k]
                if self.uniform and k + 1 < count and tails[j][k + 1] + duration > tail:
                    tail = tails[j][k] = tails[j][k + 1] + duration
                for behind, lag, shift in before:
                    if k >= shift and tail + duration + lag > behind[k - shift]:
                        behind[k - shift] = tail + duration + lag
        return tails

    def _add_area(
        self,
        domain: int,
        nodes: list[_Node],
        node_of: dict[int, int],
        heads: list[list[float]],
        tails: list[list[float]],
    ) -> None:
        """Memory x time: what the activations of this domain hold at least, and for how long."""
        by_kind = {(self.graph.works[i].kind, self.graph.works[i].stage): n for i, n in node_of.items()}
        for (kind, stage), first in by_kind.items():
            held, kept = self.problem.costs.held(stage), self.problem.costs.held_after_input_grad(stage)
            rank = nodes[first].resource[1]
            if kind is not Kind.F or math.isinf(self.graph.caps[rank]) or self.problem.held(stage) <= 0:
                continue
            last = by_kind.get((Kind.W, stage), by_kind.get((Kind.B, stage)))
            middle = by_kind.get((Kind.I, stage), last)
            assert last is not None and middle is not None
            time = kept * _longest_path(nodes, first, last) + (held - kept) * _longest_path(nodes, first, middle)
            self.area[rank] += len(nodes[first].durations) * time
            self.lead[rank] = min(self.lead[rank], heads[first][0])
            self.trail[rank] = min(self.trail[rank], tails[last][-1])


def _longest_path(nodes: list[_Node], first: int, last: int) -> float:
    """From the start of `first` to the end of `last` within one microbatch."""
    ends = [-math.inf] * len(nodes)
    ends[first] = nodes[first].duration
    for j in range(first + 1, last + 1):
        for p, lag, shift in nodes[j].before:
            if shift == 0 and p < j:
                ends[j] = max(ends[j], ends[p] + lag + nodes[j].duration)
    return ends[last]


def one_machine(jobs: list[tuple[float, float, float]]) -> float:
    """The best makespan of `(head, duration, tail)` jobs on one machine that may interrupt them.

    Jackson's rule: of the jobs that are there, always the one with the longest tail.
    """
    jobs = sorted(jobs)
    waiting: list[tuple[float, float]] = []
    time = best = 0.0
    position, count = 0, len(jobs)
    while position < count or waiting:
        if not waiting:
            time = max(time, jobs[position][0])
        while position < count and jobs[position][0] <= time + _EPS:
            heapq.heappush(waiting, (-jobs[position][2], jobs[position][1]))
            position += 1
        minus_tail, left = heapq.heappop(waiting)
        until = jobs[position][0] if position < count else math.inf
        if left > until - time + _EPS:
            heapq.heappush(waiting, (minus_tail, left - (until - time)))
            time = until
        else:
            time += left
            best = max(best, time - minus_tail)
    return best
