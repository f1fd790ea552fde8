"""The published order of layerwise-disaggregated training: one forward, one backward, around a U.

MindSpeed's users know it by four names for the edge's work: FS (forward of the head), FE (forward of the tail),
BS (backward of the tail, where the backward starts), BE (backward of the head). P ranks, M microbatches:

    edge      warm-up      FS            min(P, M) times
              turnaround   FE BS         K times, K = min(M, int((4 P + 1) / 6))
              steady       FS FE BS BE   M - K times (FS while there is one left)
              cool-down    BE            K times
    cloud r   warm-up      F             min(P - r, M) times
              steady       F B           while there is a forward left
              cool-down    B             the rest

K is how many microbatches turn round at the edge before the first gradient is back: of the published sources the code
has this K (P = 2..8: 1, 2, 2, 3, 4, 4, 5), the documentation another, and neither runs when M < K.
"""

from __future__ import annotations

from functools import partial

from ldt_schedules.planning.actions import Action, Kind


def turnarounds(num_ranks: int, num_microbatches: int) -> int:
    """K of the rule above. (The source adds 1e-5 before cutting: 4 P + 1 is never just below a multiple of 6.)"""
    return min(num_microbatches, (4 * num_ranks + 1) // 6)


def one_lap_row(place: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """The order of the rank at `place` of the ring (0: the edge), for microbatches 0..M-1."""
    return (_edge_row if place == 0 else partial(_cloud_row, place))(num_ranks, num_microbatches)


def _edge_row(num_ranks: int, num_microbatches: int) -> list[Action]:
    head, tail = 0, num_ranks
    warmup = min(num_ranks, num_microbatches)
    turned = turnarounds(num_ranks, num_microbatches)
    row = [_forward(head, m) for m in range(warmup)]
    for m in range(turned):
        row += [_forward(tail, m), _backward(tail, m)]
    for step in range(num_microbatches - turned):
        if warmup + step < num_microbatches:
            row.append(_forward(head, warmup + step))
        row += [_forward(tail, turned + step), _backward(tail, turned + step), _backward(head, step)]
    row += [_backward(head, m) for m in range(num_microbatches - turned, num_microbatches)]
    return row


def _cloud_row(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    warmup = min(num_ranks - rank, num_microbatches)
    row = [_forward(rank, m) for m in range(warmup)]
    for m in range(num_microbatches):
        if warmup + m < num_microbatches:
            row.append(_forward(rank, warmup + m))
        row.append(_backward(rank, m))
    return row


def _forward(stage: int, microbatch: int) -> Action:
    return Action(Kind.F, stage, (microbatch,))


def _backward(stage: int, microbatch: int) -> Action:
    return Action(Kind.B, stage, (microbatch,))
