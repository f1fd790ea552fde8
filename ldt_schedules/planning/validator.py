"""Says everything that is wrong with a table, all at once, each with its place.

Most of it is one question asked of `dependencies`: is every value made once, before it is taken, and taken once? The
rest: is the action possible at all (stage, microbatch, rank, peer), do the messages of a lane leave and arrive in one
order, and does anybody wait for ever (`progress`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.channels import lane
from ldt_schedules.planning.dependencies import MESSAGES, Dataflow, Value, What
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.progress import waiting_forever
from ldt_schedules.planning.table import ScheduleTable

_CONTEXT_ROWS = 3
_SHOWN_AT_ONCE = 20
_GAPS_NAMED = 5

Place = tuple[int, int]
"""(pipeline rank, index in its row)"""


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong.

    Attributes:
        check: which rule, in a word: action, peer, twice, order, missing, unmatched, left over, incomplete, fifo, deadlock.
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


def check(table: ScheduleTable) -> None:
    """Raises ScheduleError, with every violation, when the table is not valid."""
    violations = validate(table)
    if violations:
        shown = "\n".join(violation.render() for violation in violations[:_SHOWN_AT_ONCE])
        more = len(violations) - _SHOWN_AT_ONCE
        count = f"{len(violations)} thing{'s are' if len(violations) > 1 else ' is'} wrong with this table:"
        raise ScheduleError(f"{count}\n{shown}" + (f"\n… and {more} more" if more > 0 else ""))


def validate(table: ScheduleTable, blocking: bool = False) -> list[Violation]:
    """Every violation, in the order of ranks and rows; an empty list for a valid table.

    Args:
        blocking: also demand that nobody waits for ever when each SEND and RECV holds up its rank until it is done. The
            runtime posts them and goes on, so this is stricter than needed.
    """
    return _Validation(table).run(blocking)


@dataclass
class _Validation:
    table: ScheduleTable
    found: list[Violation] = field(default_factory=list)
    made: dict[Value, list[Place]] = field(default_factory=lambda: defaultdict(list))
    taken: dict[Value, list[Place]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.flow = Dataflow(self.table.layout, self.table.forward_only)

    def run(self, blocking: bool) -> list[Violation]:
        possible = [place for place in self._places() if self._is_possible(*place)]
        for place in possible:
            for value in self.flow.makes(self._action(place)):
                self.made[value].append(place)
            for value in self.flow.takes(self._action(place)):
                self.taken[value].append(place)
        self._made_and_taken_once()
        self._taken_after_made()
        self._nothing_left_over()
        self._complete()
        self._lanes_in_order(possible)
        if not self.found:
            for rank, index, why in waiting_forever(self.table, blocking):
                self._report("deadlock", (rank, index), why)
        return sorted(self.found, key=lambda violation: (violation.rank, violation.index))

    def _places(self) -> Iterator[Place]:
        for rank, row in enumerate(self.table.ranks):
            for index in range(len(row)):
                yield rank, index

    def _action(self, place: Place) -> Action:
        return self.table.ranks[place[0]][place[1]]

    def _report(self, name: str, place: Place, message: str) -> None:
        rank, index = place
        row = self.table.ranks[rank]
        around = range(max(0, index - _CONTEXT_ROWS), min(len(row), index + _CONTEXT_ROWS + 1)) if index >= 0 else ()
        context = tuple(f"{'>' if i == index else ' '} {i:4d}  {row[i]}" for i in around)
        self.found.append(Violation(name, rank, index, str(row[index]) if index >= 0 else "", message, context))

    def _is_possible(self, rank: int, index: int) -> bool:
        """Stage, microbatches, rank and peer; what fails here takes no part in the other checks."""
        layout, action = self.table.layout, self._action((rank, index))
        if not 0 <= action.stage < len(layout.stages):
            self._report(
                "action", (rank, index), f"there is no stage {action.stage}; stages are 0..{len(layout.stages) - 1}"
            )
            return False
        for m in action.microbatches:
            if not 0 <= m < self.table.num_microbatches:
                self._report(
                    "action",
                    (rank, index),
                    f"there is no microbatch {m}; they are 0..{self.table.num_microbatches - 1}",
                )
                return False
            if layout.rank_of(action.stage, m) != rank:
                where = layout.rank_of(action.stage, m)
                self._report("action", (rank, index), f"stage {action.stage} stands on rank {where}, not on {rank}")
                return False
        if self.table.forward_only and not action.kind.is_forward:
            self._report("action", (rank, index), "a forward-only table has no backward")
            return False
        try:
            self.flow.takes(action)
        except ScheduleError as error:
            self._report("peer", (rank, index), str(error).partition(": ")[2])
            return False
        return True

    def _made_and_taken_once(self) -> None:
        for verb, users in (("made", self.made), ("taken", self.taken)):
            for value, places in users.items():
                for place in places[1:]:
                    first = f"rank {places[0][0]}, action {places[0][1]} ({self._action(places[0])})"
                    self._report("twice", place, f"the {value} is {verb} twice; before it by {first}")

    def _taken_after_made(self) -> None:
        for value, places in self.taken.items():
            makers = self.made.get(value, [])
            for place in places:
                if value.what in MESSAGES:
                    if not makers:
                        self._report("unmatched", place, f"nobody sends it: no action makes the {value}")
                elif not any(maker < place for maker in makers if maker[0] == place[0]):
                    later = ", ".join(f"action {index} ({self._action((rank, index))})" for rank, index in makers)
                    if later:
                        self._report("order", place, f"needs the {value}, which comes only later, from {later}")
                    else:
                        self._report("missing", place, f"needs the {value}, which no action of this rank makes")

    def _nothing_left_over(self) -> None:
        for value, places in self.made.items():
            if value in self.taken or value.what is What.WEIGHT_GRAD:
                continue
            if value.what in MESSAGES:
                self._report("unmatched", places[0], f"nobody receives it: no action takes the {value}")
            else:
                self._report("left over", places[0], f"makes the {value}, which nobody takes")

    def _complete(self) -> None:
        """Every stage runs every microbatch; of a row with many gaps the first few are named and the rest counted."""
        layout, count = self.table.layout, self.table.num_microbatches
        present: dict[str, dict[int, set[int]]] = {"F": defaultdict(set), "B": defaultdict(set)}
        for row in self.table.ranks:
            for action in row:
                if action.kind is Kind.F:
                    present["F"][action.stage].update(action.microbatches)
        for value in self.made:
            if value.what is What.WEIGHT_GRAD:
                present["B"][value.stage].add(value.microbatch)
        for stage in range(len(layout.stages)):
            for kind in ("F",) if self.table.forward_only else ("F", "B"):
                missing = count - sum(0 <= m < count for m in present[kind][stage])
                gaps = (m for m in range(count) if m not in present[kind][stage])
                for m in islice(gaps, _GAPS_NAMED):
                    more = f" (and {missing - _GAPS_NAMED} more of this stage)" if missing > _GAPS_NAMED else ""
                    hint = " (or I and W)" if kind == "B" else ""
                    self._report(
                        "incomplete", (layout.rank_of(stage, m), -1), f"{kind} s{stage} m{m}{hint} is missing{more}"
                    )

    def _lanes_in_order(self, places: list[Place]) -> None:
        """The k-th SEND from one rank to another on a lane is the k-th RECV there: communicators match by order."""
        sent: dict[tuple[int, int], list[tuple[Value, Place]]] = defaultdict(list)
        received: dict[tuple[int, int], list[tuple[Value, Place]]] = defaultdict(list)
        for place in places:
            action = self._action(place)
            if action.peer is None:
                continue
            if action.kind.is_send:
                sent[place[0], action.peer] += [(value, place) for value in self.flow.makes(action)]
            else:
                received[action.peer, place[0]] += [(value, place) for value in self.flow.takes(action)]
        for (sender, receiver), messages in sent.items():
            for number, ((mine, _), (theirs, place)) in enumerate(
                zip(messages, received[sender, receiver], strict=False)
            ):
                if mine != theirs:
                    self._report(
                        "fifo",
                        place,
                        f"message {number} from rank {sender} on {lane(sender, receiver)} is the {mine}, "
                        f"but the {theirs} is received at its place",
                    )
                    break
