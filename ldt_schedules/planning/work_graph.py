"""A problem as planners and bounds see it: kinds of work with instances, instead of single actions.

All microbatches of a domain go through the same stages, so the actions of one kind, stage and domain differ only in
their number. They are one *work*; its k-th *instance* belongs to the k-th microbatch of the domain. Planners keep every
work in that order, which costs nothing when microbatches are equal (instances can be relabelled) and leaves only a
few candidates on each rank at any time:

    rank 0 of a U      F s0   F sP   B sP   B s0         (split: I and W for each B)
    a cloud rank       F s    B s

The arcs between works come from `dependencies`, asked once for each work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.dependencies import Dataflow, Value, What
from ldt_schedules.planning.memory import change
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.table import ComputeOrder


@dataclass(frozen=True, slots=True)
class Arc:
    """Instance k of `target` needs instance k of `source`; between ranks a message takes `transmission` on the wire
    `resource` (-1: none needed, nothing to queue for) and `latency` after it."""

    source: int
    target: int
    latency: float = 0.0
    transmission: float = 0.0
    resource: int = -1

    @property
    def delay(self) -> float:
        return self.latency + self.transmission


@dataclass(frozen=True, slots=True)
class Work:
    """All actions of one kind, stage and domain.

    `durations[k]` of instance k, `microbatches[k]` its microbatch; `takes` of memory at its start, `frees` at its end.
    """

    kind: Kind
    stage: int
    domain: int
    rank: int
    microbatches: tuple[int, ...]
    durations: tuple[float, ...]
    takes: float
    frees: float


@dataclass(frozen=True)
class WorkGraph:
    """Works in an order in which every one comes after what it needs; `into[w]` and `out[w]` are the arcs of work w.
    `split` is as in `work_graph`."""

    num_ranks: int
    split: bool
    works: tuple[Work, ...]
    into: tuple[tuple[Arc, ...], ...]
    out: tuple[tuple[Arc, ...], ...]
    caps: tuple[float, ...]
    num_resources: int

    @property
    def num_instances(self) -> int:
        return sum(len(work.durations) for work in self.works)

    def works_on(self, rank: int) -> list[int]:
        """The works of one rank."""
        return [index for index, work in enumerate(self.works) if work.rank == rank]

    def reversed(self) -> WorkGraph:
        """The same problem with time running backwards: arcs turned, memory taken where it was freed.

        Work w and instance k become work w and instance n - 1 - k. A schedule of one, mirrored, is a schedule of the
        other, as long as nothing queues for a wire.
        """
        works = tuple(
            Work(w.kind, w.stage, w.domain, w.rank, w.microbatches[::-1], w.durations[::-1], w.frees, w.takes)
            for w in self.works
        )
        into: list[list[Arc]] = [[] for _ in works]
        out: list[list[Arc]] = [[] for _ in works]
        for arcs in self.into:
            for arc in arcs:
                turned = Arc(arc.target, arc.source, arc.delay)
                into[arc.source].append(turned)
                out[arc.target].append(turned)
        return WorkGraph(
            self.num_ranks,
            self.split,
            works,
            tuple(map(tuple, into)),
            tuple(map(tuple, out)),
            self.caps,
            self.num_resources,
        )

    def order(self, starts: Sequence[Sequence[float]]) -> ComputeOrder:
        """The compute order that a schedule stands for; `starts[w][k]` is the start of instance k of work w."""
        rows: list[list[tuple[float, float, Action]]] = [[] for _ in range(self.num_ranks)]
        for work, times in zip(self.works, starts, strict=True):
            row = rows[work.rank]
            for start, duration, m in zip(times, work.durations, work.microbatches, strict=True):
                row.append((start, start + duration, Action(work.kind, work.stage, (m,))))
        # Python's sort is stable and works come in the order of their needs: it decides between actions of no length.
        return tuple(tuple(a for _, _, a in sorted(row, key=lambda entry: entry[:2])) for row in rows)


def work_graph(problem: Problem, split: bool) -> WorkGraph:
    """The works of `problem`; with `split` every stage that can does I and W, without, every stage that can does B."""
    return _Builder(problem, split).build()


class _Builder:
    def __init__(self, problem: Problem, split: bool) -> None:
        self.problem, self.layout, self.costs = problem, problem.layout, problem.costs
        self.split = split
        self.flow = Dataflow(problem.layout)
        self.resources: dict[object, int] = {}

    def build(self) -> WorkGraph:
        works: list[Work] = []
        into: list[tuple[Arc, ...]] = []
        for domain in range(self.layout.num_domains):
            members = tuple(m for m in range(self.problem.num_microbatches) if self.layout.domain(m) == domain)
            if not members:
                continue
            maker: dict[Value, int] = {}
            for kind, stage in self._kinds():
                action = Action(kind, stage, members[:1])
                needs = [value for value in self.flow.takes(action) if not self._is_implied(value)]
                arcs = [self._arc(maker[value], len(works), value, works) for value in needs]
                into.append(tuple(arcs))
                for value in self.flow.makes(action):
                    reached = self.flow.delivery(value) if value.what in (What.OUTPUT, What.INPUT_GRAD) else value
                    maker[reached] = len(works)
                works.append(self._work(kind, stage, domain, members))
        out: list[list[Arc]] = [[] for _ in works]
        for arcs_in in into:
            for arc in arcs_in:
                out[arc.source].append(arc)
        caps = tuple(self.problem.cap(rank) for rank in range(self.layout.num_ranks))
        return WorkGraph(
            self.layout.num_ranks,
            self.split,
            tuple(works),
            tuple(into),
            tuple(map(tuple, out)),
            caps,
            len(self.resources),
        )

    def _is_implied(self, value: Value) -> bool:
        """What a forward saved is there when the gradient of its output is: that came by way of the same forward."""
        return value.what is What.SAVED and bool(self.layout.consumers(value.stage))

    def _kinds(self) -> list[tuple[Kind, int]]:
        kinds = [(Kind.F, stage) for stage in self.layout.forward_order]
        for stage in reversed(self.layout.forward_order):
            kinds += [(kind, stage) for kind in backward_kinds(self.problem, stage, self.split)]
        return kinds

    def _work(self, kind: Kind, stage: int, domain: int, members: tuple[int, ...]) -> Work:
        more = change(Action(kind, stage, members[:1]), self.costs) if self.layout.has_backward(stage) else 0.0
        return Work(
            kind=kind,
            stage=stage,
            domain=domain,
            rank=self.layout.rank_of(stage, members[0]),
            microbatches=members,
            durations=tuple(self.costs.time(kind, stage, m) for m in members),
            takes=max(0.0, more),
            frees=max(0.0, -more),
        )

    def _arc(self, source: int, target: int, value: Value, works: list[Work]) -> Arc:
        """The arc for a value that is an input of `target`: over a link when its maker is on another rank."""
        sender = works[source].rank
        receiver = self.layout.rank_of(value.stage, value.microbatch)
        if sender == receiver:
            return Arc(source, target)
        transmission, latency, wire = self.costs.passage(sender, receiver, value.edge)
        resource = self.resources.setdefault(wire, len(self.resources)) if transmission > 0 else -1
        return Arc(source, target, latency, transmission, resource)


def backward_kinds(problem: Problem, stage: int, split: bool) -> tuple[Kind, ...]:
    """How a plan does the backward of `stage`: (B,) or (I, W), or () where nobody needs a gradient."""
    if not problem.layout.has_backward(stage):
        return ()
    can_split, can_fuse = problem.costs.can(Kind.I, stage), problem.costs.can(Kind.B, stage)
    return (Kind.I, Kind.W) if can_split and (split or not can_fuse) else (Kind.B,)
