"""Says everything that is wrong with a table, all at once, each with its place.

Most of it is one question asked of `dependencies`: is every value made once, before it is taken, and taken once? The
rest: is the action possible at all (stage, microbatch, rank, peer), do the messages of a lane leave and arrive in one
order, does anybody wait for ever (`progress`), and does every rank stay within its memory.

    action       no such stage or microbatch, on the wrong rank, a backward in an evaluation
    peer         a SEND or RECV whose peer has no such neighbour
    twice        a value made or taken a second time
    order        taken before it is made           missing      taken, made nowhere on this rank
    unmatched    a SEND without its RECV, or the other way round
    left over    made and not used: what was saved or received for nothing
    incomplete   a stage that does not run every microbatch
    fifo         the k-th message sent on a lane is not the k-th received
    deadlock     ranks that wait for each other; the message shows the circle
    memory       more held than the rank may hold
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import islice

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.bulk import many_objects
from ldt_schedules.planning.channels import lane
from ldt_schedules.planning.dependencies import MESSAGES, What
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.memory import first_excess
from ldt_schedules.planning.numbering import Family, Key
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.progress import Families, Semantics, Stuck, circle, numbering_of, waiting_forever
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
        check: which rule, in a word, as listed above.
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


def check(table: ScheduleTable, problem: Problem | None = None) -> None:
    """Raises ScheduleError, with every violation, when the table is not valid."""
    violations = validate(table, problem=problem)
    if violations:
        shown = "\n".join(violation.render() for violation in violations[:_SHOWN_AT_ONCE])
        more = len(violations) - _SHOWN_AT_ONCE
        count = f"{len(violations)} thing{'s are' if len(violations) > 1 else ' is'} wrong with this table:"
        raise ScheduleError(f"{count}\n{shown}" + (f"\n… and {more} more" if more > 0 else ""))


def validate(table: ScheduleTable, blocking: bool = False, problem: Problem | None = None) -> list[Violation]:
    """Every violation, in the order of ranks and rows; an empty list for a valid table.

    Args:
        blocking: also demand that nobody waits for ever when each SEND and RECV holds up its rank until it is done. The
            runtime posts them and goes on, so this is stricter than needed.
        problem: what the table is for; then its memory caps hold too.

    Raises:
        ScheduleError: the problem has other stages, ranks or microbatches than the table.
    """
    if problem is not None:
        _require_same_work(table, problem)
    with many_objects():
        return _Validation(table, problem).run(blocking)


def _require_same_work(table: ScheduleTable, problem: Problem) -> None:
    mine, theirs = table.layout, problem.layout
    same = [(s.ranks, set(s.inputs)) for s in mine.stages] == [(s.ranks, set(s.inputs)) for s in theirs.stages]
    if not same or mine.num_ranks != theirs.num_ranks:
        raise ScheduleError(
            f"the table has {len(mine.stages)} stages on {mine.num_ranks} ranks, the problem {len(theirs.stages)} on "
            f"{theirs.num_ranks}, or they are connected differently"
        )
    domains = [[layout.domain(m) for m in range(problem.num_microbatches)] for layout in (mine, theirs)]
    if domains[0] != domains[1] and mine.num_domains > 1 and table.num_microbatches == problem.num_microbatches:
        raise ScheduleError("the table and the problem put the microbatches into different domains")
    if table.num_microbatches != problem.num_microbatches:
        raise ScheduleError(
            f"the table has {table.num_microbatches} microbatches, the problem {problem.num_microbatches}"
        )


@dataclass
class _Validation:
    """`made` and `taken`: the place of each value, by its number (see `numbering`)."""

    table: ScheduleTable
    problem: Problem | None = None
    found: list[Violation] = field(default_factory=list)
    made: dict[int, Place] = field(default_factory=dict)
    taken: dict[int, Place] = field(default_factory=dict)
    done: dict[tuple[str, int], set[int]] = field(default_factory=lambda: defaultdict(set))
    sent: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    received: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    received_at: dict[tuple[int, int], list[Place]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.numbers = numbering_of(self.table)
        self.families: Families = [[] for _ in self.table.ranks]

    def run(self, blocking: bool) -> list[Violation]:
        for rank, row in enumerate(self.table.ranks):
            known: dict[Key, Family | None] = {}
            for index, action in enumerate(row):
                family = self._family(rank, index, action, known)
                if family is not None:
                    self._add((rank, index), action, family)
                    self.families[rank].append(family)
        self._taken_after_made()
        self._nothing_left_over()
        self._complete()
        self._lanes_in_order()
        if not self.found:
            self._nobody_waits_for_ever(blocking)
            self._within_memory()
        return sorted(self.found, key=lambda violation: (violation.rank, violation.index))

    def _report(self, name: str, place: Place, message: str) -> None:
        rank, index = place
        row = self.table.ranks[rank]
        around = range(max(0, index - _CONTEXT_ROWS), min(len(row), index + _CONTEXT_ROWS + 1)) if index >= 0 else ()
        context = tuple(f"{'>' if i == index else ' '} {i:4d}  {row[i]}" for i in around)
        text = str(row[index]) if 0 <= index < len(row) else ""
        self.found.append(Violation(name, rank, index, text, message, context))

    def _family(self, rank: int, index: int, action: Action, known: dict[Key, Family | None]) -> Family | None:
        """What the action takes and makes; None if stage, microbatches, rank or peer are impossible, which is reported.

        What fails here takes no part in the other checks.
        """
        for m in action.microbatches:
            if not 0 <= m < self.table.num_microbatches:
                last = self.table.num_microbatches - 1
                self._report("action", (rank, index), f"there is no microbatch {m}; they are 0..{last}")
                return None
        key = self.numbers.key(action)
        family = known.get(key)
        if family is None or len(action.microbatches) > 1:  # what is wrong is said each time
            wrong = self._what_is_impossible(rank, action)
            if wrong is not None:
                self._report(wrong[0], (rank, index), wrong[1])
                return None
            family = known[key] = self.numbers.family(action)
        return family

    def _what_is_impossible(self, rank: int, action: Action) -> tuple[str, str] | None:
        layout = self.table.layout
        if not 0 <= action.stage < len(layout.stages):
            return "action", f"there is no stage {action.stage}; stages are 0..{len(layout.stages) - 1}"
        for m in action.microbatches:
            if layout.rank_of(action.stage, m) != rank:
                where = layout.rank_of(action.stage, m)
                return "action", f"stage {action.stage} of microbatch {m} stands on rank {where}, not on {rank}"
        if len({layout.domain(m) for m in action.microbatches}) > 1:
            return "action", "packs microbatches of different domains"
        if self.table.forward_only and not action.kind.is_forward:
            return "action", "a forward-only table has no backward"
        try:
            self.numbers.family(action)
        except ScheduleError as error:
            return "peer", str(error).partition(": ")[2]
        return None

    def _add(self, place: Place, action: Action, family: Family) -> None:
        """Note what the action makes, takes and moves."""
        microbatches, made, taken = action.microbatches, self.made, self.taken
        for m in microbatches:
            for base in family.makes:
                first = made.setdefault(base + m, place)
                if first is not place:
                    self._twice("made", base + m, first, place)
            for base in family.takes:
                first = taken.setdefault(base + m, place)
                if first is not place:
                    self._twice("taken", base + m, first, place)
        if action.kind.is_compute:
            if action.kind is not Kind.I:
                self.done["F" if action.kind is Kind.F else "B", action.stage].update(microbatches)
        elif action.kind.is_send:
            assert action.peer is not None
            self.sent[place[0], action.peer] += [base + m for m in microbatches for base in family.makes]
        else:
            assert action.peer is not None
            self.received[action.peer, place[0]] += [base + m for m in microbatches for base in family.takes]
            self.received_at[action.peer, place[0]] += [place] * len(microbatches)

    def _twice(self, verb: str, number: int, first: Place, place: Place) -> None:
        before = f"rank {first[0]}, action {first[1]} ({self._action(first)})"
        self._report("twice", place, f"the {self.numbers.value(number)} is {verb} twice; before it by {before}")

    def _action(self, place: Place) -> Action:
        return self.table.ranks[place[0]][place[1]]

    def _taken_after_made(self) -> None:
        made = self.made
        for number, place in self.taken.items():
            maker = made.get(number)
            if maker is not None and maker[0] == place[0] and maker < place:
                continue
            what = self.numbers.what(number)[0]
            if what in MESSAGES:
                if maker is None:
                    value = self.numbers.value(number)
                    self._report("unmatched", place, f"nobody sends it: no action makes the {value}")
            elif maker is None:
                value = self.numbers.value(number)
                self._report("missing", place, f"needs the {value}, which no action of this rank makes")
            else:
                later = f"action {maker[1]} ({self._action(maker)})"
                value = self.numbers.value(number)
                self._report("order", place, f"needs the {value}, which comes only later, from {later}")

    def _nothing_left_over(self) -> None:
        for number, place in self.made.items():
            if number in self.taken:
                continue
            what = self.numbers.what(number)[0]
            if what in MESSAGES:
                value = self.numbers.value(number)
                self._report("unmatched", place, f"nobody receives it: no action takes the {value}")
            elif what is not What.WEIGHT_GRAD:
                self._report("left over", place, f"makes the {self.numbers.value(number)}, which nobody takes")

    def _complete(self) -> None:
        """Every stage runs every microbatch; of a row with many gaps the first few are named and the rest counted."""
        layout, count = self.table.layout, self.table.num_microbatches
        for stage in range(len(layout.stages)):
            for kind in ("F",) if self.table.forward_only else ("F", "B"):
                present = self.done[kind, stage]
                missing = count - len(present)
                gaps = (m for m in range(count) if m not in present)
                for m in islice(gaps, _GAPS_NAMED if missing else 0):
                    more = f" (and {missing - _GAPS_NAMED} more of this stage)" if missing > _GAPS_NAMED else ""
                    hint = " (or I and W)" if kind == "B" else ""
                    self._report(
                        "incomplete", (layout.rank_of(stage, m), -1), f"{kind} s{stage} m{m}{hint} is missing{more}"
                    )

    def _lanes_in_order(self) -> None:
        """The k-th SEND from one rank to another on a lane is the k-th RECV there: communicators match by order."""
        for ends, sent in self.sent.items():
            received = self.received[ends]
            if sent == received:
                continue
            for number, (mine, theirs) in enumerate(zip(sent, received, strict=False)):
                if mine != theirs:
                    self._report(
                        "fifo",
                        self.received_at[ends][number],
                        f"message {number} from rank {ends[0]} on {lane(*ends)} is the {self.numbers.value(mine)}, "
                        f"but the {self.numbers.value(theirs)} is received at its place",
                    )
                    break

    def _nobody_waits_for_ever(self, blocking: bool) -> None:
        stuck = waiting_forever(self.table, Semantics.RENDEZVOUS, self.numbers, self.families)
        how = ""
        if stuck:
            in_mailboxes = waiting_forever(self.table, Semantics.BUFFERED, self.numbers, self.families)
            how = " (even if messages are buffered)" if in_mailboxes else " (when a message needs both sides)"
        elif blocking:
            stuck = waiting_forever(self.table, Semantics.BLOCKING, self.numbers, self.families)
            how = " (when every SEND and RECV holds up its rank)"
        round_trip = self._describe(circle(stuck))
        for one in stuck:
            self._report("deadlock", (one.rank, one.index), one.why + how + round_trip)

    def _describe(self, ranks: list[Stuck]) -> str:
        if not ranks:
            return ""

        def stands_at(one: Stuck) -> str:
            row = self.table.ranks[one.rank]
            return f"rank {one.rank} at {row[one.index] if one.index < len(row) else 'the end of its row'}"

        return "; the circle: " + " waits for ".join(stands_at(one) for one in [*ranks, ranks[0]])

    def _within_memory(self) -> None:
        if self.problem is None or self.table.forward_only:
            return
        for rank, row in enumerate(self.table.ranks):
            excess = first_excess(row, self.problem, rank)
            if excess is not None:
                index, held = excess
                cap = self.problem.cap(rank)
                self._report("memory", (rank, index), f"holds {held:g} of memory here, but the rank may hold {cap:g}")


def deadlocks_when_blocking(table: ScheduleTable) -> bool:
    """Would a valid table stand still if every SEND and RECV held up its rank?"""
    return bool(waiting_forever(table, Semantics.BLOCKING))
