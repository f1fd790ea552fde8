"""One thing that is wrong with a table, with its place."""

from __future__ import annotations

from dataclasses import dataclass

from ldt_schedules.planning.formats import grid
from ldt_schedules.planning.table import ScheduleTable

_CONTEXT_ROWS = 3


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong.

    Attributes:
        check: which rule, in a word, as `validator` lists them.
        rank, index: where; index -1 when it concerns a whole row.
        action: text of the action there, empty when there is none.
        context: the rows around it, the place marked.
    """

    check: str
    rank: int
    index: int
    action: str
    message: str
    context: tuple[str, ...] = ()

    def render(self) -> str:
        """Several lines for people."""
        where = f"rank {self.rank}" + (f", action {self.index} ({self.action})" if self.action else "")
        return "\n".join([f"{where}: {self.message} [{self.check}]", *(f"    {line}" for line in self.context)])


def violation_at(table: ScheduleTable, check: str, rank: int, index: int, message: str) -> Violation:
    """With the rows of the table around it, and their cells if those have numbers of their author's."""
    row = table.ranks[rank]
    around = range(max(0, index - _CONTEXT_ROWS), min(len(row), index + _CONTEXT_ROWS + 1)) if index >= 0 else ()
    context = tuple(f"{'>' if i == index else ' '} {i:4d}  {row[i]}{_cell(table, rank, i)}" for i in around)
    text = str(row[index]) if 0 <= index < len(row) else ""
    return Violation(check, rank, index, text, message, context)


def _cell(table: ScheduleTable, rank: int, index: int) -> str:
    labelled = any(stage.label is not None for stage in table.layout.stages)
    return f"  = {grid.cell(table, rank, index)}" if labelled else ""
