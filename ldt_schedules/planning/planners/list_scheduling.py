"""List scheduling: walk through time; whenever a rank is free, it starts the ready work with the least target.

    time ──►    a work ends ──► its memory is free, its messages leave
                a message arrives ──► an instance becomes ready
                a free rank ──► of the ready instances that may be admitted, the one with the least target starts

A rank does not idle while something may start (a non-delay schedule), unless it is told to be patient (`Rules`) or the pass
runs backwards in time (`improvement`). An instance that takes memory is admitted when it fits, and when afterwards every
microbatch in flight on the rank can still get all it needs in some order (the banker's rule, Dijkstra 1965): on the
edge, a head in flight needs room for its tail later.

Time is exact: events closer than `_EPS` are one instant.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ldt_schedules.planning.problem import MEMORY_SLACK
from ldt_schedules.planning.work_graph import WorkGraph

Targets = Sequence[Sequence[float]]
"""`targets[w][k]`: when instance k of work w should start, or any other figure of urgency; less is sooner."""

_EPS = 1e-9
_INFINITY = float("inf")


@dataclass(frozen=True, slots=True)
class Plan:
    """When each instance starts and ends."""

    starts: list[list[float]]
    ends: list[list[float]]
    makespan: float


@dataclass(frozen=True, slots=True)
class Rules:
    """How a pass decides beside the targets.

    Attributes:
        room: for each work that takes memory, how much of it may be held at once, on top of the rank's cap.
        reserve: keep memory for what is more urgent and already under way, instead of giving it to what is here.
        patience: stay idle for what is more urgent and will be there within so many durations of what is here.
    """

    room: tuple[float, ...] | None = None
    reserve: bool = False
    patience: float = 0.0


RULES = Rules()
"""Never idle, never reserve, no shares of memory."""


class ListScheduler:
    """List scheduling of one graph; build once, run with many targets."""

    def __init__(self, graph: WorkGraph) -> None:
        self.graph = graph
        self.counts = [len(work.durations) for work in graph.works]
        self.durations = [work.durations for work in graph.works]
        self.rank_of = [work.rank for work in graph.works]
        self.takes = [work.takes for work in graph.works]
        self.frees = [work.frees for work in graph.works]
        self.of_rank = [graph.works_on(rank) for rank in range(graph.num_ranks)]
        # Arcs in the form the loop reads: (arc number, latency, transmission, resource).
        self.arcs_out: list[list[tuple[int, float, float, int]]] = []
        self.target_of: list[int] = []
        self.arcs_into: list[list[int]] = [[] for _ in graph.works]
        number = 0
        for arcs in graph.out:
            outgoing = []
            for arc in arcs:
                outgoing.append((number, arc.latency, arc.transmission, arc.resource))
                self.target_of.append(arc.target)
                self.arcs_into[arc.target].append(number)
                number += 1
            self.arcs_out.append(outgoing)
        self.num_arcs = number
        self.bankers = [_Banker(graph, rank, works) for rank, works in enumerate(self.of_rank)]

    def run(self, targets: Targets, rules: Rules = RULES) -> Plan | None:
        """One schedule; None when it got stuck (memory that is held in a circle over several ranks)."""
        return _Run(self, targets, rules).run()


class _Run:
    """The state of one pass: how many instances of each work are ready, have started, have ended."""

    def __init__(self, scheduler: ListScheduler, targets: Targets, rules: Rules) -> None:
        graph, counts = scheduler.graph, scheduler.counts
        self.scheduler, self.targets = scheduler, targets
        self.room, self.reserve, self.patience = rules.room, rules.reserve, rules.patience
        # For each arc, when the message of each instance that has been started will be there.
        self.expected: list[list[float]] = [[] for _ in range(scheduler.num_arcs)]
        self.started, self.ended = [0] * len(counts), [0] * len(counts)
        self.ready = [0 if scheduler.arcs_into[w] else count for w, count in enumerate(counts)]
        self.arrived = [0] * scheduler.num_arcs
        self.used = [0.0] * graph.num_ranks
        self.idle = [True] * graph.num_ranks
        self.wire_free = [0.0] * graph.num_resources
        self.starts: list[list[float]] = [[] for _ in counts]
        self.ends: list[list[float]] = [[] for _ in counts]
        # (time, work that ends) or (time, -1 - arc whose message arrives)
        self.events: list[tuple[float, int]] = []

    def run(self) -> Plan | None:
        touched = set(range(len(self.idle)))
        now = 0.0
        while True:
            self._start_what_can(touched, now)
            if not self.events:
                break
            now = self.events[0][0]
            touched = self._work_off(now)
        if self.started != self.scheduler.counts:
            return None
        return Plan(self.starts, self.ends, max(row[-1] for row in self.ends))

    def _start_what_can(self, ranks: set[int], now: float) -> None:
        """On each free rank, start the ready and admissible instance with the least target."""
        scheduler, targets = self.scheduler, self.targets
        started, ready, takes, idle = self.started, self.ready, scheduler.takes, self.idle
        for rank in ranks:
            if not idle[rank]:
                continue
            best, least = -1, _INFINITY
            for w in scheduler.of_rank[rank]:
                k = started[w]
                if k < ready[w] and targets[w][k] < least and (not takes[w] or self._admits(w, rank)):
                    best, least = w, targets[w][k]
            if best >= 0:
                end = now + scheduler.durations[best][started[best]]
                if self.patience and self._worth_waiting(rank, best, now, end):
                    continue
                self.starts[best].append(now)
                self.ends[best].append(end)
                started[best] += 1
                self.used[rank] += takes[best]
                idle[rank] = False
                heapq.heappush(self.events, (end, best))
                if self.patience:
                    for arc, latency, transmission, _ in scheduler.arcs_out[best]:
                        self.expected[arc].append(end + latency + transmission)

    def _worth_waiting(self, rank: int, candidate: int, now: float, end: float) -> bool:
        """Will something more urgent be there soon, so that the rank had better stay idle until then?"""
        least = self.targets[candidate][self.started[candidate]]
        until = now + self.patience * (end - now)
        for w in self.scheduler.of_rank[rank]:
            k = self.started[w]
            if k < self.ready[w] or k >= self.scheduler.counts[w] or self.targets[w][k] >= least:
                continue
            there = [self.expected[arc][k] for arc in self.scheduler.arcs_into[w] if k < len(self.expected[arc])]
            if len(there) == len(self.scheduler.arcs_into[w]) and max(there) <= until:
                need = self.scheduler.takes[w]
                if not need or self.used[rank] + need <= self.scheduler.bankers[rank].cap:
                    return True
        return False

    def _admits(self, work: int, rank: int) -> bool:
        """May `work` take its memory now?"""
        banker, used, started, ended = self.scheduler.bankers[rank], self.used[rank], self.started, self.ended
        need = self.scheduler.takes[work]
        if used + need > banker.cap:
            return False
        if self.room is not None:
            held = (started[work] - ended[banker.closing[work]]) * need
            if held + need > self.room[work] + _EPS:
                return False
        if self.reserve and banker.is_reserved(work, self.targets, started, ended, used):
            return False
        return banker.trivial or banker.admits(work, started, ended, used)

    def _work_off(self, now: float) -> set[int]:
        """Everything that happens at this instant; returns the ranks it may concern."""
        scheduler, events, ended = self.scheduler, self.events, self.ended
        touched: set[int] = set()
        horizon = now + _EPS
        while events and events[0][0] <= horizon:
            event = heapq.heappop(events)[1]
            if event < 0:
                self._arrive(-1 - event, touched)
                continue
            ended[event] += 1
            rank = scheduler.rank_of[event]
            self.used[rank] -= scheduler.frees[event]
            self.idle[rank] = True
            touched.add(rank)
            for arc, latency, transmission, resource in scheduler.arcs_out[event]:
                there = now + latency
                if resource >= 0:
                    sent = max(self.wire_free[resource], now) + transmission
                    self.wire_free[resource] = sent
                    there = sent + latency
                if there > now:
                    heapq.heappush(events, (there, -1 - arc))
                else:
                    self._arrive(arc, touched)
        return touched

    def _arrive(self, arc: int, touched: set[int]) -> None:
        """One more instance's input is there; the instance is ready once all its inputs are."""
        scheduler, arrived = self.scheduler, self.arrived
        arrived[arc] += 1
        target = scheduler.target_of[arc]
        into = scheduler.arcs_into[target]
        self.ready[target] = arrived[arc] if len(into) == 1 else min([arrived[a] for a in into])
        touched.add(scheduler.rank_of[target])


class _Banker:
    """Admission of memory on one rank.

    `closing[w]` is the work that ends what w takes. With one such work in all (or no cap) nothing can be held in a
    circle; with several, microbatches in flight fall into groups that hold the same things, and it must be possible to
    serve the groups one after the other, each getting what it lacks and giving back everything.
    """

    def __init__(self, graph: WorkGraph, rank: int, works: list[int]) -> None:
        self.cap = graph.caps[rank] + MEMORY_SLACK
        self.closing: dict[int, int] = {}
        takers = [w for w in works if graph.works[w].takes > 0]
        for w in takers:
            self.closing[w] = _closing_work(graph, w)
        self.takes = {w: graph.works[w].takes for w in takers}
        self.sources = {w: [arc.source for arc in graph.into[w]] for w in takers if graph.into[w]}
        domains = sorted({graph.works[w].domain for w in takers})
        self.levels = [[(w, self.closing[w]) for w in takers if graph.works[w].domain == d] for d in domains]
        self.trivial = self.cap == float("inf") or all(len(levels) < 2 for levels in self.levels)

    def is_reserved(self, work: int, targets: Targets, started: list[int], ended: list[int], used: float) -> bool:
        """Would `work` take memory that a more urgent instance needs, whose input is under way to this rank?"""
        free = self.cap - used - self.takes[work]
        mine = targets[work][started[work]]
        for other, sources in self.sources.items():
            k = started[other]
            too_big = other != work and self.takes[other] > free
            more_urgent = too_big and k < len(targets[other]) and targets[other][k] < mine
            if more_urgent and all(ended[source] > k for source in sources):
                return True
        return False

    def admits(self, work: int, started: list[int], ended: list[int], used: float) -> bool:
        """Is the state safe once `work` has taken its memory?"""
        started[work] += 1
        groups: list[tuple[float, float]] = []  # (what the first member lacks, what the group holds)
        for levels in self.levels:
            borders = sorted({n for opening, closing in levels for n in (started[opening], ended[closing])})
            for low, high in pairwise(borders):
                lacks = holds = 0.0
                for opening, closing in levels:
                    if low >= started[opening]:
                        lacks += self.takes[opening]
                    elif low >= ended[closing]:
                        holds += self.takes[opening]
                if holds:
                    groups.append((lacks, holds * (high - low)))
        started[work] -= 1
        groups.sort()
        free = self.cap - used - self.takes[work]
        for lacks, holds in groups:
            if lacks > free:
                return False
            free += holds
        return True


def _closing_work(graph: WorkGraph, opening: int) -> int:
    """The work of the same stage and domain that frees (most of) what `opening` takes."""
    first = graph.works[opening]
    same = [w for w, work in enumerate(graph.works) if (work.stage, work.domain) == (first.stage, first.domain)]
    return max(same, key=lambda w: (graph.works[w].frees, w))
