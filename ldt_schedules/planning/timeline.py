"""When each compute action started and ended: simulated by `simulator`, or measured by the runtime.

rank 0   F F F F · B B          bubble    the share of the time a rank does not compute (the dots)
rank 1   · F F F F B B B B      makespan  from 0 to the end of the last action
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ldt_schedules.planning.actions import Action, Kind


class Span(NamedTuple):
    """One compute action on one pipeline rank; times in the unit of whoever measured, from the start of the step."""

    rank: int
    action: Action
    start: float
    end: float


class Transfer(NamedTuple):
    """One message of one microbatch: which SEND (`other` as in `Action`), from which rank to which; on the wire from
    `start` to `sent`, there at `arrived`."""

    sender: int
    receiver: int
    kind: Kind
    stage: int
    other: int | None
    microbatch: int
    start: float
    sent: float
    arrived: float

    @property
    def send(self) -> Action:
        """The SEND that posts it."""
        return Action(self.kind, self.stage, (self.microbatch,), self.receiver, self.other)


@dataclass(frozen=True)
class Timeline:
    """All compute of one step, in the order in which it ended.

    `exposed[r]` is the time rank r stood still for a message that was already under way: communication that no
    computation hides. A measured timeline may have neither transfers nor exposed times.
    """

    num_ranks: int
    spans: tuple[Span, ...]
    transfers: tuple[Transfer, ...] = ()
    exposed: tuple[float, ...] = ()

    @cached_property
    def makespan(self) -> float:
        """End of the last action; 0 for an empty step."""
        return max((span.end for span in self.spans), default=0.0)

    @cached_property
    def rows(self) -> tuple[tuple[Span, ...], ...]:
        """The spans of each rank, in the order in which they ran."""
        rows: list[list[Span]] = [[] for _ in range(self.num_ranks)]
        for span in self.spans:
            rows[span.rank].append(span)
        return tuple(tuple(row) for row in rows)

    def busy(self, rank: int) -> float:
        """How long `rank` computes."""
        return sum(span.end - span.start for span in self.rows[rank])

    def bubble_of(self, rank: int) -> float:
        """Idle share of `rank`, 0..1."""
        return 1 - self.busy(rank) / self.makespan if self.makespan else 0.0

    @property
    def bubble(self) -> float:
        """Idle share of all ranks together, 0..1."""
        return sum(self.bubble_of(rank) for rank in range(self.num_ranks)) / self.num_ranks

    @cached_property
    def peak_in_flight(self) -> tuple[int, ...]:
        """For each rank, the most (stage, microbatch) pairs whose activations it holds at one time.

        Held from the start of F to the end of B (or of W). The edge's head and tail count separately. A stage that never
        goes backward (frozen, or in an evaluation) holds nothing.
        """
        return tuple(_peak(row) for row in self.rows)

    def peak_of_stage(self, rank: int, stage: int) -> int:
        """The most microbatches of `stage` whose activations `rank` holds at one time."""
        return _peak(span for span in self.rows[rank] if span.action.stage == stage)


def stages_backward(row: Iterable[Span]) -> set[int]:
    """The stages of a rank that go backward. The others keep nothing of what they computed."""
    return {span.action.stage for span in row if span.action.kind is not Kind.F}


def _peak(row: Iterable[Span]) -> int:
    row = tuple(row)
    keeping = stages_backward(row)
    held = peak = 0
    for span in row:  # one action at a time, so the order of the row is the order of the changes
        if span.action.stage not in keeping:
            continue
        if span.action.kind is Kind.F:
            held += len(span.action.microbatches)
            peak = max(peak, held)
        elif span.action.kind in (Kind.B, Kind.W):
            held -= len(span.action.microbatches)
    return peak
