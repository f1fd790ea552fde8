"""Can an action be done at all, whatever stands around it?"""

from __future__ import annotations

from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.numbering import Numbering
from ldt_schedules.planning.table import ScheduleTable


def why_impossible(action: Action, rank: int, table: ScheduleTable, numbers: Numbering) -> tuple[str, str] | None:
    """(name of the check as in `validator`, what is wrong) with an action in the row of `rank`; None: it is possible."""
    layout = table.layout
    for m in action.microbatches:
        if not 0 <= m < table.num_microbatches:
            return "action", f"there is no microbatch {m}; they are 0..{table.num_microbatches - 1}"
    if not 0 <= action.stage < len(layout.stages):
        return "action", f"there is no stage {action.stage}; stages are 0..{len(layout.stages) - 1}"
    for m in action.microbatches:
        if layout.rank_of(action.stage, m) != rank:
            where = layout.rank_of(action.stage, m)
            return "action", f"stage {action.stage} of microbatch {m} stands on rank {where}, not on {rank}"
    if len({layout.domain(m) for m in action.microbatches}) > 1:
        return "action", "packs microbatches of different domains"
    if table.forward_only and not action.kind.is_forward:
        return "action", "a forward-only table has no backward"
    needless = numbers.flow.why_needless(action)
    if needless is not None:
        return "action", needless
    try:
        numbers.family(action)
    except ScheduleError as error:
        return "peer", str(error).partition(": ")[2]
    return None
