"""The published order of a two-lap U (MindSpeed-MM's layerwise-disaggregated training of vision-language models).

The pipeline goes round twice: first with images, then with the language model. On rank r stand V = stage r of the first
lap and L = stage P + r of the second; the edge has also T = stage 2 P, the tail with the loss. With
K = floor((4 P + 1) / 6) and n = min(P - r, M):

    1.  V forward, min(P, M) times
    2.  n times:           L forward; from the K-th time on also V forward, while there is one left
    3.  edge, min(K, M):   T forward, T backward
    4.  M times, i = 0..:  L forward while left; V forward while left and i + n >= K - 1;
                           edge: T forward, T backward while left;  L backward;  V backward if i >= K
    5.  V backward, the rest

u(2), two laps:

    edge    V0 ─► cloud V1 ─► edge L2 ─► cloud L3 ─► edge T4
"""

from __future__ import annotations

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.planners.ldt_1f1b import turnarounds


def two_lap_row(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """The order of one pipeline rank, for microbatches 0..M-1 of one domain."""
    M, K = num_microbatches, turnarounds(num_ranks, num_microbatches)
    first, second, tail = rank, num_ranks + rank, 2 * num_ranks
    left = {(kind, stage): M for kind in (Kind.F, Kind.B) for stage in (first, second, tail)}
    row: list[Action] = []

    def do(kind: Kind, stage: int) -> None:
        if left[kind, stage]:
            row.append(Action(kind, stage, (M - left[kind, stage],)))
            left[kind, stage] -= 1

    def turn_round() -> None:
        if rank == 0:
            do(Kind.F, tail)
            do(Kind.B, tail)

    # The source tests against K itself, not against min(K, M): with fewer microbatches nothing is left to do then.
    uncapped = turnarounds(num_ranks, 2 * num_ranks)
    warmup = min(num_ranks - rank, M)
    for _ in range(min(num_ranks, M)):
        do(Kind.F, first)
    for i in range(warmup):
        do(Kind.F, second)
        if i >= uncapped - 1:
            do(Kind.F, first)
    for _ in range(K):
        turn_round()
    for i in range(M):
        do(Kind.F, second)
        if i + warmup >= uncapped - 1:
            do(Kind.F, first)
        turn_round()
        do(Kind.B, second)
        if i >= uncapped:
            do(Kind.B, first)
    while left[Kind.B, first]:
        do(Kind.B, first)
    return row
