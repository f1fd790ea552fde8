"""Plays a schedule on paper: when does each action start and end, if every duration is as `Costs` says?

Each rank runs its row in order, one action at a time, and starts one as soon as everything it takes is there.
Messages travel beside the computation and never wait for each other:

                start(a) = max( end of the action before a on its rank,
                                end of each producer of a + latency of the link between )

Whoever became ready is put on a list and looked at once, so the work is proportional to the number of actions.
"""

from __future__ import annotations

from collections.abc import Sequence

from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.costs import Costs
from ldt_schedules.planning.dependencies import Dataflow, Value, What
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.timeline import Span, Timeline


def simulate(layout: Layout, rows: Sequence[Sequence[Action]], costs: Costs | None = None) -> Timeline:
    """Time the compute actions of `rows` (one sequence for each rank; SENDs and RECVs are skipped).

    Equal input gives equal output: of two actions that end at one time, the one of the lower rank comes first.

    Raises:
        ScheduleError: costs that do not fit the layout, or an order in which some rank waits for ever; the message
            names every waiting rank, its action and the missing values.
    """
    costs = costs or Costs()
    costs.check_fit(layout)
    if len(rows) != layout.num_ranks:
        raise ScheduleError(f"the layout has {layout.num_ranks} pipeline ranks, the order has {len(rows)} rows")
    return _Simulation(layout, [[a for a in row if a.kind.is_compute] for row in rows], costs).run()


class _Simulation:
    """`position[r]` is the index of the action rank r is to run next; `there[v]` the time value v is there."""

    def __init__(self, layout: Layout, rows: list[list[Action]], costs: Costs) -> None:
        self.layout, self.rows, self.costs = layout, rows, costs
        self.flow = Dataflow(layout)
        self.position = [0] * len(rows)
        self.free = [0.0] * len(rows)
        self.there: dict[Value, float] = {}
        self.waiting_for: dict[Value, int] = {}
        self.spans: list[Span] = []

    def run(self) -> Timeline:
        ready = list(range(len(self.rows)))
        while ready:
            rank = ready.pop()
            while self.position[rank] < len(self.rows[rank]):
                action = self.rows[rank][self.position[rank]]
                missing = [value for value in self.flow.takes(action) if value not in self.there]
                if missing:
                    self.waiting_for[missing[0]] = rank
                    break
                ready += self._execute(rank, action)
        self._check_done()
        return Timeline(len(self.rows), tuple(sorted(self.spans, key=lambda span: (span.end, span.rank))))

    def _execute(self, rank: int, action: Action) -> list[int]:
        """Run the action; returns the ranks that were waiting for something it made."""
        start = max([self.free[rank], *(self.there[value] for value in self.flow.takes(action))])
        end = start + self.costs.duration(action)
        self.spans.append(Span(rank, action, start, end))
        self.position[rank] += 1
        self.free[rank] = end
        woken = []
        for value in self.flow.makes(action):
            arrives, arrival = value, end
            if value.what in (What.OUTPUT, What.INPUT_GRAD):
                arrives = self.flow.delivery(value)
                arrival += self.costs.transfer(rank, self.layout.rank_of(arrives.stage, arrives.microbatch))
            self.there[arrives] = arrival
            if arrives in self.waiting_for:
                woken.append(self.waiting_for.pop(arrives))
        return woken

    def _check_done(self) -> None:
        stuck = [rank for rank, row in enumerate(self.rows) if self.position[rank] < len(row)]
        if not stuck:
            return
        lines = []
        for rank in stuck:
            action = self.rows[rank][self.position[rank]]
            missing = ", ".join(str(value) for value in self.flow.takes(action) if value not in self.there)
            lines.append(f"rank {rank} waits at {action} for {missing}")
        raise ScheduleError("the order cannot go on:\n  " + "\n  ".join(lines))
