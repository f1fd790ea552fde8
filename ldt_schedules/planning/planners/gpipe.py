"""GPipe: all forwards, then all backwards (Huang et al., arXiv:1811.06965).

u(3), 2 microbatches:

    edge    F0 F0             F3 F3 B3 B3             B0 B0
    cloud1        F1 F1                         B1 B1
    cloud2              F2 F2             B2 B2

Simple and slow: every microbatch is in flight on every rank.
"""

from __future__ import annotations

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.table import ComputeOrder


def gpipe(layout: Layout, num_microbatches: int) -> ComputeOrder:
    """Works for every layout: forwards of a rank's stages in forward order, backwards in reverse order."""
    rows = []
    for rank in range(layout.num_ranks):
        stages = layout.stages_on(rank)
        forwards = [(Kind.F, stage) for stage in stages]
        backwards = [(Kind.B, stage) for stage in reversed(stages)]
        rows.append(
            tuple(
                Action(kind, stage, (m,))
                for kind, stage in forwards + backwards
                for m in range(num_microbatches)
                if layout.rank_of(stage, m) == rank
            )
        )
    return tuple(rows)
