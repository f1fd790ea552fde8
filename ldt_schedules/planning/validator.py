"""Says everything that is wrong with a table, all at once, each with its place.

Most of it is one question asked of `dependencies`: is every value made once, before it is taken, and taken once? The
rest: is the action possible at all (stage, microbatch, rank, peer), do the messages of a lane leave and arrive in one
order, does anybody wait for ever (`progress`), and does every rank stay within its memory.

    action       no such stage or microbatch, on the wrong rank, a backward in an evaluation or where nobody needs it
    peer         a SEND or RECV whose peer has no such neighbour
    twice        a value made or taken a second time
    order        taken before it is made           missing      taken, made nowhere on this rank
    unmatched    a SEND without its RECV, or the other way round
    left over    made and not used: what was saved or received for nothing
    incomplete   a stage that does not run every microbatch, forward and, if it has a backward, backward
    fifo         the k-th message sent on a lane is not the k-th received
    deadlock     ranks that wait for each other; the message shows the circle
    memory       more held than the rank may hold
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.bulk import many_objects
from ldt_schedules.planning.channels import lane
from ldt_schedules.planning.dependencies import MESSAGES, What
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.memory import first_excess
from ldt_schedules.planning.numbering import Family, Key
from ldt_schedules.planning.possible import why_impossible
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.progress import Families, Semantics, Stuck, circle, numbering_of, waiting_forever
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.planning.violation import Violation, violation_at

_SHOWN_AT_ONCE = 20
_GAPS_NAMED = 5
_WHEN = {
    Semantics.BUFFERED: "even if messages are buffered",
    Semantics.RENDEZVOUS: "when each lane of a rank works in order",
    Semantics.BLOCKING: "when every SEND and RECV holds up its rank",
}


def check(table: ScheduleTable, problem: Problem | None = None, semantics: Semantics = Semantics.RENDEZVOUS) -> None:
    """Raises ScheduleError, with every violation, when the table is not valid. Arguments as of `validate`."""
    violations = validate(table, semantics, problem)
    if violations:
        shown = "\n".join(violation.render() for violation in violations[:_SHOWN_AT_ONCE])
        more = len(violations) - _SHOWN_AT_ONCE
        count = f"{len(violations)} thing{'s are' if len(violations) > 1 else ' is'} wrong with this table:"
        raise ScheduleError(f"{count}\n{shown}" + (f"\n… and {more} more" if more > 0 else ""))


def validate(
    table: ScheduleTable, semantics: Semantics = Semantics.RENDEZVOUS, problem: Problem | None = None
) -> list[Violation]:
    """Every violation, in the order of ranks and rows; an empty list for a valid table.

    Args:
        semantics: how messages pass (`progress`). The default is the strictest that the runtime can meet on any backend;
            with `BLOCKING` nobody may wait for ever although each SEND and RECV holds up its rank.
        problem: what the table is for; then its memory caps hold too.

    Raises:
        ScheduleError: the problem has other stages, ranks or microbatches than the table.
    """
    if problem is not None:
        _require_same_work(table, problem)
    with many_objects():
        return _Validation(table, problem).run(semantics)


def _require_same_work(table: ScheduleTable, problem: Problem) -> None:
    mine, theirs = table.layout, problem.layout
    if not mine.same_work(theirs):
        raise ScheduleError(
            f"the table has {len(mine.stages)} stages on {mine.num_ranks} ranks, the problem {len(theirs.stages)} on "
            f"{theirs.num_ranks}, or they are connected differently, or others are frozen"
        )
    domains = [[layout.domain(m) for m in range(problem.num_microbatches)] for layout in (mine, theirs)]
    if domains[0] != domains[1] and mine.num_domains > 1 and table.num_microbatches == problem.num_microbatches:
        raise ScheduleError("the table and the problem put the microbatches into different domains")
    if table.num_microbatches != problem.num_microbatches:
        raise ScheduleError(
            f"the table has {table.num_microbatches} microbatches, the problem {problem.num_microbatches}"
        )


@dataclass(slots=True)
class _Group:
    """The actions of one family on one rank. What they do is noted in lists that are shared with the families it is put
    together with: the microbatches that are `done`, or the `messages` that `moves` stands for, and their `places`."""

    family: Family
    moves: tuple[int, ...] = ()
    done: set[int] = field(default_factory=set)
    messages: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class _Validation:
    """`made` and `taken`: the place of each value, by its number (see `numbering`).

    A place is rank * (length of the longest row) + index in the row: of two of one rank, the larger is the later.
    """

    def __init__(self, table: ScheduleTable, problem: Problem | None) -> None:
        self.table, self.problem = table, problem
        self.numbers = numbering_of(table)
        self.families: Families = [[] for _ in table.ranks]
        self.longest_row = max(map(len, table.ranks))
        self.found: list[Violation] = []
        self.made: dict[int, int] = {}
        self.taken: dict[int, int] = {}
        self.done: dict[tuple[str, int], set[int]] = defaultdict(set)
        self.sent: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.received: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.places: dict[tuple[int, int], list[int]] = defaultdict(list)

    def run(self, semantics: Semantics) -> list[Violation]:
        for rank in range(len(self.table.ranks)):
            self._read(rank)
        self._taken_after_made()
        self._nothing_left_over()
        self._complete()
        self._lanes_in_order()
        if not self.found:
            self._nobody_waits_for_ever(semantics)
            self._within_memory()
        return sorted(self.found, key=lambda violation: (violation.rank, violation.index))

    def _report(self, check: str, rank: int, index: int, message: str) -> None:
        self.found.append(violation_at(self.table, check, rank, index, message))

    def _report_at(self, place: int, check: str, message: str) -> None:
        self._report(check, *divmod(place, self.longest_row), message)

    def _action(self, place: int) -> str:
        rank, index = divmod(place, self.longest_row)
        return f"action {index} ({self.table.ranks[rank][index]})"

    def _read(self, rank: int) -> None:
        """Note what each action of a row makes, takes and moves; impossible ones take no part in the other checks."""
        made, taken, families, key_of = self.made, self.taken, self.families[rank], self.numbers.key
        known: dict[Key, _Group] = {}
        count, start = self.table.num_microbatches, rank * self.longest_row
        for place, action in enumerate(self.table.ranks[rank], start):
            microbatches = action.microbatches
            first = microbatches[0]
            group = None
            if len(microbatches) == 1 and 0 <= first < count:
                group = known.get(key_of(action))
            if group is None:
                group = self._group(rank, place - start, action, known)
                if group is None:
                    continue
            family = group.family
            families.append(family)
            for base in family.makes:
                before = made.setdefault(base + first, place)
                if before != place:
                    self._twice("made", base + first, before, place)
            for base in family.takes:
                before = taken.setdefault(base + first, place)
                if before != place:
                    self._twice("taken", base + first, before, place)
            if group.moves:
                for base in group.moves:
                    group.messages.append(base + first)
                    group.places.append(place)
            else:
                group.done.update(microbatches)

    def _group(self, rank: int, index: int, action: Action, known: dict[Key, _Group]) -> _Group | None:
        """The group of an action that may be the first of it; None, and reported, if it is impossible."""
        wrong = why_impossible(action, rank, self.table, self.numbers)
        if wrong is not None:
            self._report(wrong[0], rank, index, wrong[1])
            return None
        key = self.numbers.key(action)
        if key not in known:
            group = known[key] = _Group(self.numbers.family(action))
            self._share(group, rank, action)
        return known[key]

    def _share(self, group: _Group, rank: int, action: Action) -> None:
        kind, family = action.kind, group.family
        if action.peer is None:
            if kind is not Kind.I:
                group.done = self.done["F" if kind is Kind.F else "B", action.stage]
        elif kind.is_send:
            group.moves, group.messages = family.makes, self.sent[rank, action.peer]
        else:
            ends = (action.peer, rank)
            group.moves, group.messages, group.places = family.takes, self.received[ends], self.places[ends]

    def _twice(self, verb: str, number: int, before: int, place: int) -> None:
        before_it = f"rank {before // self.longest_row}, {self._action(before)}"
        self._report_at(place, "twice", f"the {self.numbers.value(number)} is {verb} twice; before it by {before_it}")

    def _taken_after_made(self) -> None:
        made = self.made
        for number, place in self.taken.items():
            maker = made.get(number)
            # What is no message is made on the rank that takes it, so that places say which comes first.
            if maker is not None and (maker < place or self.numbers.what(number)[0] in MESSAGES):
                continue
            value = self.numbers.value(number)
            if maker is not None:
                later = self._action(maker)
                self._report_at(place, "order", f"needs the {value}, which comes only later, from {later}")
            elif value.what in MESSAGES:
                self._report_at(place, "unmatched", f"nobody sends it: no action makes the {value}")
            else:
                self._report_at(place, "missing", f"needs the {value}, which no action of this rank makes")

    def _nothing_left_over(self) -> None:
        for number in [number for number in self.made if number not in self.taken]:
            what = self.numbers.what(number)[0]
            if what is What.WEIGHT_GRAD:
                continue
            place, value = self.made[number], self.numbers.value(number)
            if what in MESSAGES:
                self._report_at(place, "unmatched", f"nobody receives it: no action takes the {value}")
            else:
                self._report_at(place, "left over", f"makes the {value}, which nobody takes")

    def _complete(self) -> None:
        """Every stage runs every microbatch; of a row with many gaps the first few are named and the rest counted."""
        layout, count = self.table.layout, self.table.num_microbatches
        for stage in range(len(layout.stages)):
            for kind in ("F", "B") if self.numbers.flow.has_backward(stage) else ("F",):
                present = self.done[kind, stage]
                missing = count - len(present)
                gaps = (m for m in range(count) if m not in present)
                for m in islice(gaps, _GAPS_NAMED if missing else 0):
                    more = f" (and {missing - _GAPS_NAMED} more of this stage)" if missing > _GAPS_NAMED else ""
                    hint = " (or I and W)" if kind == "B" else ""
                    self._report(
                        "incomplete", layout.rank_of(stage, m), -1, f"{kind} s{stage} m{m}{hint} is missing{more}"
                    )

    def _lanes_in_order(self) -> None:
        """The k-th SEND from one rank to another on a lane is the k-th RECV there: communicators match by order."""
        for ends, sent in self.sent.items():
            received = self.received[ends]
            if sent == received:
                continue
            for number, (mine, theirs) in enumerate(zip(sent, received, strict=False)):
                if mine != theirs:
                    self._report_at(
                        self.places[ends][number],
                        "fifo",
                        f"message {number} from rank {ends[0]} on {lane(*ends)} is the {self.numbers.value(mine)}, "
                        f"but the {self.numbers.value(theirs)} is received at its place",
                    )
                    break

    def _nobody_waits_for_ever(self, semantics: Semantics) -> None:
        stuck = self._stuck_under(semantics)
        if not stuck:
            return
        weaker = list(Semantics)[: list(Semantics).index(semantics)]
        runs = [one for one in weaker if not self._stuck_under(one)]
        first = list(Semantics)[len(runs)]
        stuck = self._stuck_under(first)
        told = self._describe(circle(stuck)) + "; it runs under "
        told += (
            f"{_listed(runs)} messages, not under {first.value}" if runs else f"none of {_listed(Semantics)} messages"
        )
        for one in stuck:
            self._report("deadlock", one.rank, one.index, f"{one.why} ({_WHEN[first]}){told}")

    def _stuck_under(self, semantics: Semantics) -> list[Stuck]:
        return waiting_forever(self.table, semantics, self.numbers, self.families)

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
                self._report("memory", rank, index, f"holds {held:g} of memory here, but the rank may hold {cap:g}")


def deadlocks_when_blocking(table: ScheduleTable) -> bool:
    """Would a valid table stand still if every SEND and RECV held up its rank?"""
    return bool(waiting_forever(table, Semantics.BLOCKING))


def _listed(semantics: Iterable[Semantics]) -> str:
    """`buffered and rendezvous`."""
    *rest, last = (one.value for one in semantics)
    return f"{', '.join(rest)} and {last}" if rest else last
