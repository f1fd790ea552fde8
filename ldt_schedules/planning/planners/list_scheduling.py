"""List scheduling: walk through time; whenever a rank is free, it starts the ready work with the least target.

    time ──►    a work ends ──► its memory is free, its messages leave
                a message arrives ──► an instance becomes ready
                a free rank ──► of the ready instances that may be admitted, the one with the least target starts

A rank never idles while something may start (a non-delay schedule); what is worth waiting for is expressed by a second
pass with time reversed (`improve`). An instance that takes memory is admitted when it fits, and when afterwards every
microbatch in flight on the rank can still get all it needs in some order (the banker's rule, Dijkstra 1965): on the
edge, a head in flight needs room for its tail later.

Time is exact: events closer than `_EPS` are one instant.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ldt_schedules.planning.work_graph import WorkGraph

Targets = Sequence[Sequence[float]]
"""`targets[w][k]`: when instance k of work w should start, or any other figure of urgency; less is sooner."""

_EPS = 1e-9


@dataclass(frozen=True, slots=True)
class Plan:
    """When each instance starts and ends."""

    starts: list[list[float]]
    ends: list[list[float]]
    makespan: float


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
        # Arcs in the form the loop reads: (arc number, target, latency, transmission, resource).
        self.arcs_out: list[list[tuple[int, int, float, float, int]]] = []
        self.arcs_into: list[list[int]] = [[] for _ in graph.works]
        number = 0
        for arcs in graph.out:
            outgoing = []
            for arc in arcs:
                outgoing.append((number, arc.target, arc.latency, arc.transmission, arc.resource))
                self.arcs_into[arc.target].append(number)
                number += 1
            self.arcs_out.append(outgoing)
        self.num_arcs = number
        self.bankers = [_Banker(graph, rank, works) for rank, works in enumerate(self.of_rank)]

    def run(self, targets: Targets, room: Sequence[float] | None = None, reserve: bool = False) -> Plan | None:
        """One schedule; None when it got stuck (memory that is held in a circle over several ranks).

        Args:
            room: for each work that takes memory, how much of it may be held at once, on top of the rank's cap.
            reserve: keep memory for what is more urgent and already under way, instead of giving it to what is here.
        """
        works, of_rank, rank_of, durations, counts = (
            self.graph.works,
            self.of_rank,
            self.rank_of,
            self.durations,
            self.counts,
        )
        takes, frees, arcs_out, arcs_into = self.takes, self.frees, self.arcs_out, self.arcs_into
        started, ended = [0] * len(works), [0] * len(works)
        ready = [0 if arcs_into[w] else counts[w] for w in range(len(works))]
        arrived = [0] * self.num_arcs
        used = [0.0] * self.graph.num_ranks
        idle = [True] * self.graph.num_ranks
        wire_free = [0.0] * self.graph.num_resources
        starts: list[list[float]] = [[] for _ in works]
        ends: list[list[float]] = [[] for _ in works]
        caps = [cap + _EPS for cap in self.graph.caps]
        bankers = self.bankers
        limits = [float("inf")] * len(works) if room is None else list(room)
        # (time, work that ends) or (time, -1 - arc whose message arrives)
        events: list[tuple[float, int]] = []
        target_of = [arc[1] for arcs in arcs_out for arc in arcs]
        push, pop = heapq.heappush, heapq.heappop
        now, touched = 0.0, set(range(self.graph.num_ranks))
        while True:
            for rank in touched:
                if not idle[rank]:
                    continue
                best, least = -1, float("inf")
                for w in of_rank[rank]:
                    k = started[w]
                    if k < ready[w] and targets[w][k] < least:
                        need = takes[w]
                        if need and (reserve and bankers[rank].is_reserved(w, targets, started, ended, used[rank])):
                            continue
                        if need and (
                            used[rank] + need > caps[rank]
                            or (started[w] - ended[bankers[rank].closing[w]]) * need + need > limits[w] + _EPS
                            or not bankers[rank].admits(w, started, ended, used[rank])
                        ):
                            continue
                        best, least = w, targets[w][k]
                if best >= 0:
                    end = now + durations[best][started[best]]
                    starts[best].append(now)
                    ends[best].append(end)
                    started[best] += 1
                    used[rank] += takes[best]
                    idle[rank] = False
                    push(events, (end, best))
            if not events:
                break
            now = events[0][0]
            touched.clear()
            horizon = now + _EPS
            while events and events[0][0] <= horizon:
                _, event = pop(events)
                if event < 0:
                    arc = -1 - event
                    target = target_of[arc]
                    arrived[arc] += 1
                    into = arcs_into[target]
                    ready[target] = arrived[arc] if len(into) == 1 else min([arrived[a] for a in into])
                    touched.add(rank_of[target])
                    continue
                ended[event] += 1
                rank = rank_of[event]
                used[rank] -= frees[event]
                idle[rank] = True
                touched.add(rank)
                for arc, target, latency, transmission, resource in arcs_out[event]:
                    there = now + latency
                    if resource >= 0:
                        wire_free[resource] = max(wire_free[resource], now) + transmission
                        there = wire_free[resource] + latency
                    if there > now:
                        push(events, (there, -1 - arc))
                        continue
                    arrived[arc] += 1
                    into = arcs_into[target]
                    ready[target] = arrived[arc] if len(into) == 1 else min([arrived[a] for a in into])
                    touched.add(rank_of[target])
        if started != counts:
            return None
        return Plan(starts, ends, max(row[-1] for row in ends))


class _Banker:
    """Admission of memory on one rank.

    `closing[w]` is the work that ends what w takes. With one such work in all (or no cap) nothing can be held in a
    circle; with several, microbatches in flight fall into groups that hold the same things, and it must be possible to
    serve the groups one after the other, each getting what it lacks and giving back everything.
    """

    def __init__(self, graph: WorkGraph, rank: int, works: list[int]) -> None:
        self.cap = graph.caps[rank] + _EPS
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
        if self.trivial:
            return True
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
