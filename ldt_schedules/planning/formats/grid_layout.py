"""Which layout a grid speaks of: it writes down neither the stages nor who feeds whom.

A stage is known by two numbers, the one that the author gave it and its rank: several roots may all be stage 0. Who feeds
whom is read off the messages. An edge is there where one rank sends forward and the other receives it:

    0,0,SEND_F,(0,),3  ═══►  1,3,RECV_F,(0,),0        stage 0 of rank 0 feeds stage 1 of rank 3

Neighbours on one rank exchange no message, so that such an edge leaves no trace. Where one seems to be missing, the grid is
refused rather than completed by a guess: a stage that nobody reads although others are numbered higher, one that reads
nothing although its rank has an earlier stage, stages that no message connects to the rest. What cannot be seen is an edge
within a rank beside others, say from the head of a U to its tail: such a layout must be given, or the table as JSON.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout, Stage

Place = tuple[int, int]
"""(number that the author gave a stage, its rank)."""
_GIVE_JSON = (
    "messages alone say who feeds whom, and neighbours on one rank exchange none; if that is so here, give the table as "
    "JSON (ldt-table/1), which has the layout"
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a file with its line. The stage of its `action` is the author's number."""

    line: int
    text: str
    rank: int
    action: Action

    @property
    def place(self) -> Place:
        """The stage that it is of."""
        return self.action.stage, self.rank

    def __str__(self) -> str:
        return f"line {self.line}: the cell {self.text!r}"


def known_layout(cells: Iterable[Cell], num_ranks: int) -> Layout | None:
    """The U, of one lap or several, that has just the stages of these cells; None: there is none."""
    used = {cell.place for cell in cells}
    laps, rest = divmod(len(used) - 1, num_ranks)
    if num_ranks < 2 or laps < 1 or rest:
        return None
    layout = Layout.u(num_ranks) if laps == 1 else Layout.laps(num_ranks, laps)
    return layout if places(layout).keys() == used else None


def derived_layout(cells: Sequence[Cell], num_ranks: int) -> Layout:
    """The layout that the messages tell of: stages in the order of (number, rank), each fed in that order too.

    Raises:
        ScheduleError: no cell, a message that has no counterpart, or a graph of stages that must be incomplete.
    """
    first: dict[Place, Cell] = {}
    for cell in cells:
        first.setdefault(cell.place, cell)
    if not first:
        raise ScheduleError("there is no cell below the ranks' names; expected for example 'Step 00: 0,0,F,0,'")
    order = sorted(first)
    numbers = [number for number, _ in order]
    edges = _edges(cells)
    stages = []
    for index, (number, rank) in enumerate(order):
        name = f"stage{number}" if numbers.count(number) == 1 else f"stage{number}_rank{rank}"
        inputs = tuple(source for source, place in enumerate(order) if (place, (number, rank)) in edges)
        stages.append(Stage(index, name, (rank,), inputs, number))
    layout = Layout(tuple(stages), num_ranks)
    check_peers(cells, layout)
    _refuse_domains(cells, layout)
    _refuse_loose_stages(layout, [first[place] for place in order])
    return layout


def places(layout: Layout) -> dict[Place, int]:
    """The stages by what a grid calls them."""
    return {(stage.number, rank): stage.index for stage in layout.stages for rank in stage.ranks}


def stage_of(cell: Cell, known: dict[Place, int]) -> int:
    """The stage of a cell, which stands at its place in `known`.

    Raises:
        ScheduleError: there is none.
    """
    if cell.place not in known:
        where = sorted(rank for number, rank in known if number == cell.action.stage)
        there = f"it stands on rank {_listed(where)}" if where else "the layout has no such stage"
        raise ScheduleError(f"{cell}: rank {cell.rank} has no stage {cell.action.stage}; {there}")
    return known[cell.place]


def check_peers(cells: Iterable[Cell], layout: Layout) -> None:
    """Is at the other end of each message a stage that it can go to or come from?

    Raises:
        ScheduleError: the peer holds none; or two, and a cell has no place to say which.
    """
    known = places(layout)
    for cell in cells:
        action = cell.action
        if action.peer is None:
            continue
        stage = stage_of(cell, known)
        upstream = action.kind.peer_is_upstream
        ends = layout.inputs(stage) if upstream else layout.consumers(stage)
        there = [end for end in ends if action.peer in layout.stages[end].ranks]
        mine, verb = f"stage {action.stage} of rank {cell.rank}", "reads from" if upstream else "feeds"
        if action.peer == cell.rank:
            raise ScheduleError(f"{cell}: rank {cell.rank} is its own peer; stages on one rank exchange no message")
        if not there:
            right = f" {_called(layout, ends)}, but" if ends else ""
            how = "" if ends else ": an edge takes a SEND_F and, at the other end, its RECV_F"
            raise ScheduleError(f"{cell}: {mine} {verb}{right} no stage on rank {action.peer}{how}")
        if len(there) > 1 and layout.num_domains == 1:
            raise ScheduleError(
                f"{cell}: {mine} {verb} {_called(layout, there)}; a cell has no place to say which is meant, give the "
                "table as JSON (ldt-table/1)"
            )


def _edges(cells: Iterable[Cell]) -> set[tuple[Place, Place]]:
    """Which place feeds which. Where several stages of one rank feed several of another, messages of a microbatch are
    paired in their order, which is that in which they travel."""
    sent: dict[tuple[int, int], dict[int, list[Place]]] = defaultdict(lambda: defaultdict(list))
    received: dict[tuple[int, int], dict[int, list[Place]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        peer, kind = cell.action.peer, cell.action.kind
        if peer is None or peer == cell.rank or not kind.is_forward:
            continue
        messages = sent[cell.rank, peer] if kind.is_send else received[peer, cell.rank]
        for m in cell.action.microbatches:
            messages[m].append(cell.place)
    edges: set[tuple[Place, Place]] = set()
    for ends in sent.keys() & received.keys():
        senders, receivers = ({place for row in by[ends].values() for place in row} for by in (sent, received))
        if len(senders) == 1 or len(receivers) == 1:
            edges |= set(product(senders, receivers))
            continue
        for m, row in sent[ends].items():
            if len(row) == len(received[ends][m]):
                edges |= set(zip(row, received[ends][m], strict=True))
    return edges


def _refuse_domains(cells: Iterable[Cell], layout: Layout) -> None:
    """Stages of one number that share out the microbatches are one stage with a rank for each domain."""
    done: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for cell in cells:
        number, rank = cell.place
        done[number][rank].update(cell.action.microbatches)
    for number, ranks in sorted(done.items()):
        if len(ranks) > 1 and sum(map(len, ranks.values())) == len(set().union(*ranks.values())):
            raise ScheduleError(
                f"stage {number} stands on ranks {_listed(sorted(ranks))}, which share out the microbatches: which domain "
                "a microbatch is of, a grid does not say; give the table as JSON (ldt-table/1)"
            )


def _refuse_loose_stages(layout: Layout, first: Sequence[Cell]) -> None:
    """Raises ScheduleError where an edge must be missing; `first` has a cell of each stage."""
    last = max(stage.number for stage in layout.stages)
    reached = _connected_to_first(layout)
    found = []  # with how telling it is: one wrong number makes other stages look wrong too
    for s, stage in enumerate(layout.stages):
        earlier = [other for other in layout.stages_on(stage.ranks[0]) if layout.stages[other].number < stage.number]
        if layout.is_head(s) and layout.is_tail(s) and len(layout.stages) > 1:
            found.append((0, s, "no message joins it to another stage"))
        elif layout.is_tail(s) and stage.number != last:
            found.append((1, s, f"nobody receives its output, and it is not the last, which is {last}"))
        elif layout.is_head(s) and earlier:
            found.append((1, s, f"it receives nothing, but may read from {_called(layout, earlier)}"))
        elif s not in reached:
            found.append((2, s, f"no chain of messages joins it to {_called(layout, [0])}"))
    if found:
        _, s, what = min(found)
        raise ScheduleError(f"{first[s]} is of {_called(layout, [s])}: {what}; {_GIVE_JSON}")


def _connected_to_first(layout: Layout) -> set[int]:
    reached, look_at = {0}, [0]
    while look_at:
        stage = look_at.pop()
        new = {*layout.inputs(stage), *layout.consumers(stage)} - reached
        reached |= new
        look_at += new
    return reached


def _called(layout: Layout, stages: Iterable[int]) -> str:
    """`stage 0 of rank 0 and stage 0 of rank 1`."""
    return _listed([f"stage {layout.stages[s].number} of rank {_listed(layout.stages[s].ranks)}" for s in stages])


def _listed(things: Sequence[object]) -> str:
    """`0, 1 and 2`."""
    *rest, last = ["", *map(str, things)]
    return f"{', '.join(rest[1:])} and {last}" if rest[1:] else last
