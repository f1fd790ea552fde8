"""The schedule: for each pipeline rank, the ordered list of everything it does in one step."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout

ComputeOrder = tuple[tuple[Action, ...], ...]
"""One tuple of compute actions (F, B, I, W) for each pipeline rank: what a planner returns."""


def is_split(rows: ComputeOrder) -> bool:
    """Is some backward done as I and W?"""
    return any(action.kind is Kind.I for row in rows for action in row)


@dataclass(frozen=True)
class ScheduleTable:
    """`ranks[r]` is the row of pipeline rank `r`. Frozen, comparable, hashable.

    Raises:
        ScheduleError: no microbatch, or other ones than the layout's `domain_of` has; not one row for each rank of the
            layout; a table that trains although every stage is frozen (it would hold no backward at all, and pass for
            an evaluation). Everything else that can be wrong with a table is the validator's to tell, all at once.
    """

    layout: Layout
    num_microbatches: int
    ranks: ComputeOrder
    forward_only: bool = False

    def __post_init__(self) -> None:
        self.layout.check_microbatches(self.num_microbatches)
        if len(self.ranks) != self.layout.num_ranks:
            raise ScheduleError(
                f"the layout has pipeline ranks 0..{self.layout.num_ranks - 1}, the table has {len(self.ranks)} rows"
            )
        if not self.forward_only and not self.layout.is_trained:
            raise ScheduleError(
                "every stage is frozen, so that there is nothing to train: leave one of them unfrozen, or make a table "
                "for evaluation (forward only)"
            )

    @classmethod
    def from_rows(
        cls,
        layout: Layout,
        num_microbatches: int,
        rows: Sequence[Sequence[Action]] | Mapping[int, Sequence[Action]],
        forward_only: bool = False,
    ) -> ScheduleTable:
        """Build from lists; a mapping may leave out ranks that do nothing."""
        if isinstance(rows, Mapping):
            rows = [rows.get(rank, ()) for rank in range(layout.num_ranks)]
        return cls(layout, num_microbatches, tuple(tuple(row) for row in rows), forward_only)

    def compute_order(self) -> ComputeOrder:
        """The table without its SENDs and RECVs."""
        return tuple(tuple(action for action in row if action.kind.is_compute) for row in self.ranks)

    def diff(self, other: ScheduleTable) -> str:
        """A unified diff of the two tables, rank by rank; empty when the rows are equal."""
        lines: list[str] = []
        for rank in range(max(len(self.ranks), len(other.ranks))):
            mine, theirs = (
                [str(action) for action in table.ranks[rank]] if rank < len(table.ranks) else []
                for table in (self, other)
            )
            lines += difflib.unified_diff(mine, theirs, f"rank {rank}", f"rank {rank}", lineterm="")
        return "\n".join(lines)
