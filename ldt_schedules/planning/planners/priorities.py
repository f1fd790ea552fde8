"""First guesses for list scheduling: which work goes first on a rank, and how a rank shares out its memory.

A rank with one stage has two sensible orders, forward first and backward first. A rank with several stages (the edge,
or a cloud rank that the pipeline visits twice) has more; with FS, FE, BS, BE for forward and backward of its outer and
its inner stage:

    FS FE BS BE    keep the pipeline fed             FE FS BS BE    feed it, but finish what came back first
    BE BS FE FS    the oldest first                  BS BE FE FS    the loss first
    FE BS BE FS    the inner stage first             BS FE FS BE    turn round first, then feed

A weight gradient comes last, because nobody waits for it, or at once, because it holds memory.

Memory of a rank with nested stages: outer activations are held longest and could take all the room, so shares are tried
too. A share limits what one stage may hold; the rank's cap holds in any case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.planners.list_scheduling import Rules, Targets
from ldt_schedules.planning.work_graph import WorkGraph

_LATER_INSTANCE = 1e-5
_FIRST, _LAST = 0.0, 9.0

# Places of (forward of the outer stage, of the inner, backward of the inner, of the outer).
_SEVERAL = (
    (1.0, 2.0, 3.0, 4.0),
    (2.0, 1.0, 3.0, 4.0),
    (4.0, 3.0, 2.0, 1.0),
    (4.0, 3.0, 1.0, 2.0),
    (4.0, 1.0, 2.0, 3.0),
    (3.0, 2.0, 1.0, 4.0),
)
_SINGLE = ((1.0, 2.0), (2.0, 1.0))

_Shares = Callable[[WorkGraph, list[int], float], list[float]]
"""`(graph, works of one rank that take memory, its cap) -> what each of their stages may hold`."""


def seeds(graph: WorkGraph) -> Iterator[tuple[Targets, Rules]]:
    """Targets and rules to start from; the most often successful ones first."""
    rules = [*(Rules(room) for room in _rooms(graph)), Rules(patience=1.0)]
    if len(rules) > 2:
        rules = [Rules(reserve=True), *rules, Rules(reserve=True, patience=1.0)]
    split = any(work.kind is Kind.W for work in graph.works)
    for single in _SINGLE:
        for several in _SEVERAL:
            for weight_gradient in (_LAST, _FIRST) if split else (_LAST,):
                targets = _targets(graph, several, single, weight_gradient)
                for rule in rules:
                    yield targets, rule


def _targets(graph: WorkGraph, several: tuple[float, ...], single: tuple[float, ...], weight: float) -> Targets:
    targets = []
    for index, work in enumerate(graph.works):
        depth, levels = _depth(graph, index)
        if work.kind is Kind.W:
            place = weight
        elif levels == 1:
            place = single[0] if work.kind is Kind.F else single[1]
        else:
            inner = depth / (levels - 1)
            outer_place, inner_place = several[:2] if work.kind is Kind.F else (several[3], several[2])
            place = outer_place + (inner_place - outer_place) * inner
        targets.append([place + _LATER_INSTANCE * m for m in work.microbatches])
    return targets


def _depth(graph: WorkGraph, index: int) -> tuple[int, int]:
    """(how many stages of this rank and domain come before the work's stage, how many there are)."""
    work = graph.works[index]
    stages = [w.stage for w in graph.works if (w.rank, w.domain, w.kind) == (work.rank, work.domain, Kind.F)]
    return stages.index(work.stage), len(stages)


def _rooms(graph: WorkGraph) -> Iterator[tuple[float, ...] | None]:
    """No shares, shares by how long a stage must hold, and a few for the inner stages with the rest for the outermost."""
    yield None
    nested = [n for n in (_nested(graph, rank) for rank in range(graph.num_ranks)) if n]
    if not nested:
        return
    seen: list[tuple[float, ...]] = []
    for shares in (_by_holding_time, *(_inner(count) for count in (1, 2, 3)), _inner(0.25), _inner(1 / 3)):
        room = [math.inf] * len(graph.works)
        for works in nested:
            cap = graph.caps[graph.works[works[0]].rank]
            for work, share in zip(works, shares(graph, works, cap), strict=True):
                room[work] = max(share, graph.works[work].takes)
        if tuple(room) not in seen:
            seen.append(tuple(room))
            yield tuple(room)


def _nested(graph: WorkGraph, rank: int) -> list[int]:
    """The works that take memory on a rank with a cap, if there are several of one domain."""
    takers = [w for w in graph.works_on(rank) if graph.works[w].takes > 0]
    domains = {graph.works[w].domain for w in takers}
    return takers if math.isfinite(graph.caps[rank]) and len(takers) > len(domains) else []


def _by_holding_time(graph: WorkGraph, works: list[int], cap: float) -> list[float]:
    weights = [graph.works[w].takes * holding_time(graph, w) for w in works]
    total = sum(weights) or 1.0
    return [_whole(cap * weight / total, graph.works[w].takes) for w, weight in zip(works, weights, strict=True)]


def _inner(count: float) -> _Shares:
    """`count` activations (or, below 1, that part of the cap) for each inner stage, the rest for the outermost."""

    def shares(graph: WorkGraph, works: list[int], cap: float) -> list[float]:
        outermost = [w for w in works if _depth(graph, w)[0] == 0]
        sizes = {w: graph.works[w].takes for w in works}
        inner = {w: sizes[w] * count if count >= 1 else _whole(cap * count, sizes[w]) for w in works}
        left = cap - sum(max(inner[w], sizes[w]) for w in works if w not in outermost)
        return [left / len(outermost) if w in outermost else inner[w] for w in works]

    return shares


def _whole(amount: float, size: float) -> float:
    return math.floor(amount / size + 1e-9) * size


def holding_time(graph: WorkGraph, opening: int) -> float:
    """The shortest time from the start of `opening` until the last work of its stage has ended."""
    first = graph.works[opening]
    ends = {opening: min(first.durations)}
    for index in range(opening + 1, len(graph.works)):
        into = [ends[arc.source] + arc.delay for arc in graph.into[index] if arc.source in ends]
        if into:
            ends[index] = max(into) + min(graph.works[index].durations)
    own = [e for w, e in ends.items() if (graph.works[w].stage, graph.works[w].domain) == (first.stage, first.domain)]
    return max(own)
