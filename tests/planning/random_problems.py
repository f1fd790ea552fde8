"""Random layouts, costs and orders for the tests of planning: everything from one seed."""

from __future__ import annotations

import math
import random

from ldt_schedules.planning import Action, Costs, Kind, Layout, Stage
from ldt_schedules.planning.costs import Link


def random_layout(rng: random.Random, most_stages: int = 6, most_domains: int = 3) -> Layout:
    """A graph of stages in any numbering, on some ranks (of which some may be idle), with 1 to 3 domains."""
    stages, ranks, domains = rng.randint(1, most_stages), rng.randint(1, 4), rng.randint(1, most_domains)
    order = rng.sample(range(stages), stages)
    inputs = {s: tuple(rng.sample(order[:i], rng.randint(0, min(i, 2)))) for i, s in enumerate(order)}

    def places() -> tuple[int, ...]:
        return tuple(rng.randrange(ranks) for _ in range(domains if rng.random() < 0.5 else 1))

    return Layout(tuple(Stage(s, f"stage{s}", places(), inputs[s]) for s in range(stages)), ranks)


def with_domain_of(rng: random.Random, layout: Layout, microbatches: int) -> Layout:
    """Sometimes the same layout with microbatches given to its domains at random."""
    if layout.num_domains == 1 or rng.random() < 0.5:
        return layout
    domains = tuple(rng.randrange(layout.num_domains) for _ in range(microbatches))
    return Layout(layout.stages, layout.num_ranks, domains)


def random_link(rng: random.Random, wires: bool) -> Link:
    bandwidth = rng.uniform(0.2, 3) if wires and rng.random() < 0.6 else None
    return Link(rng.choice((0.0, rng.uniform(0, 3))), bandwidth, rng.choice((None, "uplink")) if bandwidth else None)


def random_costs(
    rng: random.Random, layout: Layout, microbatches: int, wires: bool = False, uniform: bool = False
) -> Costs:
    """Times that (almost) never coincide, so that no tie has to be decided."""
    count = len(layout.stages)

    def times() -> float | tuple[float, ...]:
        if uniform or rng.random() < 0.6:
            return rng.uniform(0.2, 3)
        return tuple(rng.uniform(0.2, 3) for _ in range(microbatches))

    memory = tuple(rng.choice((0.0, 0.5, 1.0, rng.uniform(0.1, 3))) for _ in range(count))
    pairs = [(a, b) for a in range(layout.num_ranks) for b in range(layout.num_ranks) if a != b]
    edges = [(source, stage.index) for stage in layout.stages for source in stage.inputs]
    return Costs(
        forward=tuple(times() for _ in range(count)),
        backward=tuple(times() for _ in range(count)),
        input_grad=tuple(times() for _ in range(count)),
        weight_grad=tuple(times() for _ in range(count)),
        memory=memory,
        memory_w=tuple(m * rng.choice((0.0, rng.random(), 1.0)) for m in memory) if rng.random() < 0.5 else None,
        latency=rng.choice((0.0, rng.uniform(0, 4))),
        bandwidth=rng.uniform(0.3, 3) if wires and rng.random() < 0.5 else None,
        links=tuple((a, b, random_link(rng, wires)) for a, b in pairs if rng.random() < 0.4),
        default_link=random_link(rng, wires),
        forward_size=rng.uniform(0.1, 2),
        backward_size=rng.uniform(0.1, 2),
        sizes=tuple((*edge, rng.uniform(0.1, 2), rng.uniform(0.1, 2)) for edge in edges if rng.random() < 0.3),
    )


def needs(layout: Layout, action: Action) -> list[tuple[str, int]]:
    """What one microbatch's action waits for, as (F, BI or W, stage): said once more, apart from the project's rule."""
    if action.kind is Kind.F:
        return [("F", source) for source in layout.stages[action.stage].inputs]
    if action.kind is Kind.W:
        return [("BI", action.stage)]
    return [("F", action.stage), *(("BI", s.index) for s in layout.stages if action.stage in s.inputs)]


def name_of(action: Action) -> tuple[str, int]:
    return ("BI" if action.kind in (Kind.B, Kind.I) else str(action.kind), action.stage)


def random_order(rng: random.Random, layout: Layout, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Any order in which every action comes after what it needs; each backward is done whole or split."""
    left: list[Action] = []
    for stage in range(len(layout.stages)):
        for m in range(microbatches):
            kinds = [Kind.F, *rng.choice(([Kind.B], [Kind.I, Kind.W]))]
            left += [Action(kind, stage, (m,)) for kind in kinds]
    done: set[tuple[tuple[str, int], int]] = set()
    rows: list[list[Action]] = [[] for _ in range(layout.num_ranks)]
    while left:
        (m,) = (action := rng.choice(left)).microbatches
        if all((need, m) in done for need in needs(layout, action)):
            left.remove(action)
            done.add((name_of(action), m))
            rows[layout.rank_of(action.stage, m)].append(action)
    return tuple(map(tuple, rows))


def same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
