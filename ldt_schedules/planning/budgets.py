"""How much memory a plan may use, in words.

    none      no limit
    1x        on each rank what the published order needs there; 1.5x, 2x, 4x: so many times as much
    dev       "the devices you have": every cloud rank as much as the fullest cloud rank of the published order (they are
              equal machines), the edge four times what it needs there
    8GiB      on each rank; a plain number is in the unit of the problem's own memory
    8GiB,40GiB,40GiB     one for each rank

A problem that has caps of its own keeps them: of both, the smaller counts.
"""

from __future__ import annotations

import math
import re

from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import EDGE_RANK
from ldt_schedules.planning.memory import peak_memory
from ldt_schedules.planning.planners.published import published
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.simulator import simulate

DEFAULT_BUDGET = "dev"
COMPARED = ("1x", "dev", "1.5x", "2x", "4x", "none")
"""What a report tells the worth of."""

_EDGE_OF_DEV = 4.0
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?) ?([KMGT]iB|B)?")


def published_peaks(problem: Problem) -> tuple[float, ...]:
    """What the published order holds on each rank."""
    return peak_memory(simulate(problem.layout, published(problem), problem.costs), problem.costs)


def within_budget(problem: Problem, budget: str) -> Problem:
    """The problem with the caps that `budget` stands for.

    Raises:
        ScheduleError: the budget cannot be read, or is too little for a single microbatch.
    """
    caps = _caps(problem, budget.strip())
    together = tuple(min(cap, problem.cap(rank)) for rank, cap in enumerate(caps))
    return problem.with_caps(tuple(None if math.isinf(cap) else cap for cap in together))


def _caps(problem: Problem, budget: str) -> list[float]:
    ranks = problem.layout.num_ranks
    if budget == "none":
        return [math.inf] * ranks
    if budget == "dev":
        peaks = published_peaks(problem)
        cloud = max(peaks[EDGE_RANK + 1 :], default=peaks[EDGE_RANK])
        return [_EDGE_OF_DEV * peaks[EDGE_RANK], *([cloud] * (ranks - 1))]
    times = re.fullmatch(r"(\d+(?:\.\d+)?)x", budget)
    if times:
        return [float(times[1]) * peak for peak in published_peaks(problem)]
    amounts = [_amount(part.strip(), budget) for part in budget.split(",")]
    if len(amounts) not in (1, ranks):
        raise ScheduleError(f"the budget {budget!r} has {len(amounts)} amounts for {ranks} ranks; give 1 or {ranks}")
    return amounts if len(amounts) == ranks else amounts * ranks


def _amount(text: str, budget: str) -> float:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ScheduleError(
            f"cannot read the memory budget {budget!r}; allowed are none, dev, 1x (or 1.5x, 2x, …), an amount such as "
            "8GiB, or one amount for each rank, separated by commas"
        )
    return float(match[1]) * _UNITS[match[2] or ""]
