"""Which stages are frozen, in formats that have no place to say so: it is read off the backwards that are not there.

A table that trains goes backward through every stage that needs a gradient (`Layout.has_backward`). A stage without any
backward, fed by such stages alone, to which nobody sends a gradient either, is frozen: nothing else would make that table
whole. What cannot be seen is a frozen stage behind a trained one, which goes backward as all others do, and any in an
evaluation, where nothing does: such a table is refused when it is to be written, not written as another one.
"""

from __future__ import annotations

from collections.abc import Sequence

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.table import ScheduleTable


def check_can_be_seen(table: ScheduleTable) -> None:
    """Would `as_seen` find the table's frozen stages?

    Raises:
        ScheduleError: not all of them.
    """
    layout = table.layout
    for stage in layout.stages:
        if stage.frozen and (table.forward_only or layout.has_backward(stage.index)):
            because = "goes backward all the same" if layout.has_backward(stage.index) else "is only evaluated"
            raise ScheduleError(
                f"stage {stage.index} is frozen and {because}, for which this format has no place; write JSON instead"
            )


def as_seen(layout: Layout, rows: Sequence[Sequence[Action]]) -> Layout:
    """The layout with those stages frozen that the actions, one row for each rank, show to be.

    Where actions contradict each other (a gradient is sent to a stage without a backward) nothing is frozen: what is
    missing then, the validator tells.
    """
    actions = [action for row in rows for action in row]
    backward = {action.stage for action in actions if not action.kind.is_forward}
    seen = {action.stage for action in actions if action.kind is Kind.F} - backward
    frozen: set[int] = set()
    for stage in layout.forward_order:
        if stage in seen and frozen.issuperset(layout.inputs(stage)):
            frozen.add(stage)
    if not backward or not frozen:
        return layout
    for action in actions:
        if action.kind is Kind.SEND_B and action.peer is not None:
            ends = [s for s in layout.inputs(action.stage) if action.peer in layout.stages[s].ranks]
            if frozen.issuperset(ends):
                return layout
    return layout.freeze(frozen)
