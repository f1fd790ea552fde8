"""Grids of any graph of stages. `omni_table.txt` is a published one: three encoders feed a chain on three more ranks."""

from __future__ import annotations

import pathlib

import pytest

from ldt_schedules.planning import (
    Action,
    Costs,
    Layout,
    ScheduleError,
    ScheduleTable,
    Stage,
    plan,
    read_table,
    simulate,
    table_hash,
    validate,
    write_table,
)
from ldt_schedules.planning.formats import grid
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.progress import Semantics

OMNI_FILE = pathlib.Path(__file__).parents[2] / "examples" / "omni" / "omni_table.txt"
OMNI_TEXT = OMNI_FILE.read_text(encoding="utf-8")
OMNI = read_table(OMNI_TEXT)
ROOTS = Layout.roots({"audio": 0, "vision": 1, "text": 2}, {"join": 3, "middle": 4, "last": 5})
BESIDE_THE_HEAD = Layout.roots({"audio": 0, "vision": 0}, {"head": 0, "cloud1": 1, "cloud2": 2, "tail": 0})


def text_of(*rows):
    """A grid with these rows, one list of cells a rank."""
    steps = range(max(map(len, rows)))
    cells = [" ".join(row[step] for row in rows if step < len(row)) for step in steps]
    header = " ".join(f"Rank {rank}" for rank in range(len(rows)))
    return "\n".join([header, *(f"Step {step:02d}: {line}" for step, line in enumerate(cells))])


def test_the_published_table():
    layout = OMNI.layout
    assert layout.same_work(ROOTS) and OMNI.num_microbatches == 4 and not OMNI.forward_only
    assert [stage.label for stage in layout.stages] == [stage.label for stage in ROOTS.stages]
    assert [stage.name for stage in layout.stages][:4] == ["stage0_rank0", "stage0_rank1", "stage0_rank2", "stage1"]
    assert [len(row) for row in OMNI.ranks] == [16, 16, 16, 40, 24, 16]
    assert validate(OMNI) == validate(OMNI, Semantics.BLOCKING) == []
    assert validate(OMNI, problem=Problem(ROOTS, 4)) == []
    assert simulate(layout, OMNI.ranks, Costs(forward=1, backward=2)).makespan == 21


def test_it_is_printed_as_it_was_published():
    expected = [line.rstrip() for line in OMNI_TEXT.splitlines()]
    assert grid.dumps(OMNI).splitlines() == expected
    through_json = read_table(write_table(OMNI, "json"))
    assert through_json == OMNI and table_hash(through_json) == table_hash(OMNI)
    assert grid.dumps(through_json).splitlines() == expected


def test_a_layout_may_be_given():
    named = grid.loads(OMNI_TEXT, ROOTS)
    assert named.layout == ROOTS and named.ranks == OMNI.ranks
    with pytest.raises(ScheduleError, match=r"line 2: the cell '0,1,F,0,': rank 1 has no stage 0; it stands on rank 0"):
        grid.loads(OMNI_TEXT, Layout.u(6))


def test_labels_are_written_only_where_there_are_some():
    assert '"label"' in write_table(OMNI, "json")
    assert '"label"' not in write_table(plan("gpipe", Layout.laps(3), 2), "json")


def test_us_are_known_by_their_cells():
    for layout in (Layout.u(2), Layout.u(5), Layout.laps(2), Layout.laps(3), Layout.laps(2, 3)):
        table = plan("gpipe", layout, 3)
        assert read_table(write_table(table, "grid")) == table


def test_a_broken_u_is_left_to_the_validator():
    """The cells are those of a U, so that the layout does not hang on the messages, and all mistakes are told at once."""
    text = write_table(plan("gpipe", Layout.u(3), 2), "grid")
    broken = read_table(text.replace("0,0,SEND_F,(0,),1", "0,0,SEND_F,(0,),2"))
    assert broken.layout == Layout.u(3)
    assert {"peer", "unmatched"} <= {violation.check for violation in validate(broken)}


@pytest.mark.parametrize(
    "layout",
    [
        ROOTS,
        Layout(tuple(Stage(s, f"s{s}", (s,), (s - 1,) if s else ()) for s in range(4))),
        Layout(
            (
                Stage(0, "root", (0,), ()),
                Stage(1, "left", (1,), (0,)),
                Stage(2, "right", (2,), (0,)),
                Stage(3, "join", (3,), (0, 1, 2)),
            )
        ),
        Layout(
            (
                Stage(0, "a", (0,), ()),
                Stage(1, "b", (1,), (0,)),
                Stage(2, "c", (2,), (1,)),
                Stage(3, "d", (0,), (2,)),
                Stage(4, "e", (1,), (3,)),
            )
        ),
        Layout(Layout.u(2).stages[:2], 4),
    ],
)
def test_who_feeds_whom_is_read_off_the_messages(layout):
    """Roots, a plain chain, several consumers, two edges between the same two ranks, ranks without a stage."""
    for planner in ("gpipe", "one_f_one_b", "auto"):
        table = plan(planner, layout, 3)
        again = read_table(write_table(table, "grid"))
        assert again.layout.same_work(layout) and again.ranks == table.ranks


def test_packed_cells():
    """With the blank that Python prints into a tuple too."""
    rows = (
        ["0,0,F,(0, 1),", "0,0,SEND_F,(0,1),1", "0,0,RECV_B,(0,1),1", "0,0,B,(0,1),"],
        ["1,1,RECV_F,(0, 1),0", "1,1,F,(0,1),", "1,1,B,(0,1),", "1,1,SEND_B,(0, 1),0"],
    )
    table = read_table(text_of(*rows))
    assert [str(action) for action in table.ranks[0]] == [
        "F s0 m(0,1)", "SEND_F s0 m(0,1) ->1", "RECV_B s0 m(0,1) <-1", "B s0 m(0,1)",
    ]  # fmt: skip
    assert validate(table) == [] and table.num_microbatches == 2
    assert read_table(write_table(table, "grid")) == table


REFUSED = [
    ("0,0,SEND_F,(0,),3", "0,0,SEND_F,(0,),", "line 3: the cell '0,0,SEND_F,(0,),' names no peer; write the rank to"),
    ("1,3,RECV_F,(0,),0", "1,3,RECV_F,(0,),", "line 2: the cell '1,3,RECV_F,(0,),' names no peer; write the rank from"),
    (
        "0,0,SEND_F,(2,),3",
        "0,0,SEND_F,(2,),4",
        "line 7: the cell '0,0,SEND_F,(2,),4': stage 0 of rank 0 feeds stage 1 of rank 3, but no stage on rank 4",
    ),
    (
        "0,1,RECV_B,(2,),3",
        "0,1,RECV_B,(2,),5",
        "line 14: the cell '0,1,RECV_B,(2,),5': stage 0 of rank 1 feeds stage 1 of rank 3, but no stage on rank 5",
    ),
    (
        "2,4,RECV_F,(1,),3",
        "2,4,RECV_F,(1,),0",
        "line 5: the cell '2,4,RECV_F,(1,),0': stage 2 of rank 4 reads from stage 1 of rank 3, but no stage on rank 0",
    ),
    (
        "1,3,SEND_B,(2,),1",
        "1,3,SEND_B,(2,),4",
        "stage 1 of rank 3 reads from stage 0 of rank 0, stage 0 of rank 1 and stage 0 of rank 2, but no stage on rank 4",
    ),
    ("2,4,RECV_F,(1,),3", "2,4,RECV_F,(1,),4", "rank 4 is its own peer"),
    ("2,4,RECV_F,(1,),3", "2,9,RECV_F,(1,),3", "the cell '2,9,RECV_F,(1,),3' is of rank 9, the grid has 6 columns"),
    ("0,0,F,3,", "7,0,F,3,", "line 8: the cell '7,0,F,3,' is of stage 7 of rank 0: no message joins it to"),
]


@pytest.mark.parametrize(("cell", "by", "message"), REFUSED)
def test_a_wrong_cell_is_refused_with_its_line(cell, by, message):
    assert OMNI_TEXT.count(cell) == 1
    with pytest.raises(ScheduleError) as caught:
        read_table(OMNI_TEXT.replace(cell, by))
    assert message in str(caught.value)


def test_an_edge_takes_both_sides():
    text = OMNI_TEXT
    for m in range(4):
        text = text.replace(f"1,3,RECV_F,({m},),1", "")
    with pytest.raises(
        ScheduleError, match=r"line 3: the cell '0,1,SEND_F,\(0,\),3': stage 0 of rank 1 feeds no stage on"
    ):
        read_table(text)


def test_blank_lines_count():
    with pytest.raises(ScheduleError, match="line 4: cannot read the cell 'x'"):
        read_table("Rank 0\n\nStep 00: 0,0,F,0,\nStep 01: x")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((["0,0,F,0,", "1,0,F,0,"],), "the cell '0,0,F,0,' is of stage 0 of rank 0: no message joins it to another"),
        ((["0,0,F,0,"], ["1,1,F,0,"]), "the cell '0,0,F,0,' is of stage 0 of rank 0: no message joins it to another"),
        (
            (["0,0,F,0,", "1,0,F,0,", "1,0,SEND_F,(0,),1"], ["2,1,RECV_F,(0,),0", "2,1,F,0,"]),
            "the cell '0,0,F,0,' is of stage 0 of rank 0: no message joins it to another stage",
        ),
        (
            (["0,0,F,0,", "0,0,SEND_F,(0,),1", "5,0,F,0,"], ["1,1,RECV_F,(0,),0", "1,1,F,0,"]),
            "the cell '5,0,F,0,' is of stage 5 of rank 0: no message joins it to another stage",
        ),
        (
            (
                ["0,0,F,0,", "0,0,SEND_F,(0,),1"],
                ["1,1,RECV_F,(0,),0", "1,1,F,0,"],
                ["0,2,F,0,", "0,2,SEND_F,(0,),3"],
                ["1,3,RECV_F,(0,),2", "1,3,F,0,"],
            ),
            "of stage 0 of rank 2: no chain of messages joins it to stage 0 of rank 0",
        ),
        (
            (
                ["0,0,F,0,", "0,0,SEND_F,(0,),1", "2,0,F,0,", "2,0,SEND_F,(0,),2"],
                ["1,1,RECV_F,(0,),0", "1,1,F,0,", "1,1,SEND_F,(0,),2"],
                ["3,2,RECV_F,(0,),1", "3,2,RECV_F,(0,),0", "3,2,F,0,"],
            ),
            "the cell '2,0,F,0,' is of stage 2 of rank 0: it receives nothing, but may read from stage 0 of rank 0",
        ),
        (
            (
                ["0,0,F,0,", "0,0,SEND_F,(0,),1", "0,0,SEND_F,(0,),2"],
                ["1,1,RECV_F,(0,),0", "1,1,F,0,"],
                ["2,2,RECV_F,(0,),0", "2,2,F,0,"],
            ),
            "of stage 1 of rank 1: nobody receives its output, and it is not the last, which is 2",
        ),
        (
            (
                ["0,0,F,0,", "0,0,SEND_F,(0,),1", "1,0,F,0,", "1,0,SEND_F,(0,),1"],
                ["2,1,RECV_F,(0,),0", "2,1,RECV_F,(0,),0", "2,1,F,0,"],
            ),
            "reads from stage 0 of rank 0 and stage 1 of rank 0; a cell has no place to say which is meant",
        ),
    ],
)
def test_a_graph_that_messages_do_not_show_is_refused(rows, message):
    with pytest.raises(ScheduleError) as caught:
        read_table(text_of(*rows))
    assert message in str(caught.value) and "JSON (ldt-table/1)" in str(caught.value)


def test_what_a_grid_cannot_say_needs_the_layout():
    table = plan("gpipe", BESIDE_THE_HEAD, 2)
    text = write_table(table, "grid")
    with pytest.raises(ScheduleError, match=r"no message joins it to another stage.* give the table as JSON"):
        read_table(text)
    assert grid.loads(text, BESIDE_THE_HEAD) == table
    domains = Layout.u(3, domains=2)
    table = plan("gpipe", domains, 4)
    text = write_table(table, "grid")
    with pytest.raises(ScheduleError, match="stage 1 stands on ranks 1 and 3, which share out the microbatches"):
        read_table(text)
    assert grid.loads(text, domains) == table


def test_without_cells():
    with pytest.raises(ScheduleError, match="there is no cell below the ranks' names"):
        read_table("Rank 0 Rank 1\n")


def test_an_excerpt_marks_the_cell():
    lines = grid.excerpt(OMNI, 1, 2, rows=1).splitlines()
    assert len(lines) == 4 and lines[0].split() == [word for rank in range(6) for word in ("Rank", str(rank))]
    assert [line[:8] for line in lines[1:]] == ["Step 01:", "Step 02:", "Step 03:"]
    assert ">0,1,F,1,<" in lines[2] and grid.excerpt(OMNI, 1, 2).count(">") == 1
    for rank, start in enumerate(match for match in range(len(lines[0])) if lines[0].startswith("Rank", match)):
        assert all(line[start:].lstrip(">").startswith((f"0,{rank}", f"1,{rank}", f"2,{rank}", f"3,{rank}"))
                   for line in lines[1:]), lines  # fmt: skip
    assert grid.excerpt(OMNI, 3, 39).splitlines()[-1].split() == ["Step", "39:", ">1,3,SEND_B,(3,),2<"]
    assert grid.cell(OMNI, 1, 2) == "0,1,F,1,"


def test_an_excerpt_past_the_end_of_a_row():
    assert "><" in grid.excerpt(OMNI, 0, 16) and "Step 40: " in grid.excerpt(OMNI, 3, 40)


def test_any_table_has_an_excerpt():
    fork = Layout((Stage(0, "root", (0,), ()), Stage(1, "a", (1,), (0,)), Stage(2, "b", (1,), (0,))))
    table = plan("gpipe", fork, 2)
    with pytest.raises(ScheduleError, match="no place for SEND_F"):
        grid.dumps(table)
    assert ">SEND_F s0 m0 ->1/s1<" in grid.excerpt(table, 0, 1)
    wrong = ScheduleTable.from_rows(fork, 1, [[Action.parse("F s9 m0")], []])
    assert grid.cell(wrong, 0, 0) == "9,0,F,0,"


def with_early_receive():
    """The published table, but rank 4 receives its first gradient before its last activation."""
    rows = [list(row) for row in OMNI.ranks]
    gradient, activation = Action.parse("RECV_B s4 m0 <-5"), Action.parse("RECV_F s4 m3 <-3")
    rows[4].remove(gradient)
    rows[4].insert(rows[4].index(activation), gradient)
    return ScheduleTable.from_rows(OMNI.layout, 4, rows)


@pytest.mark.parametrize("semantics", [Semantics.RENDEZVOUS, Semantics.BLOCKING])
def test_a_deadlock_says_who_waits_and_what_would_run(semantics):
    found = validate(with_early_receive(), semantics)
    assert {violation.check for violation in found} == {"deadlock"} and len(found) == 6
    for violation in found:
        assert "the circle: rank 4 at F s4 m3 waits for rank 5 at F s5 m3 waits for rank 4" in violation.message
        assert violation.message.endswith("; it runs under buffered messages, not under rendezvous")
        assert "(when each lane of a rank works in order)" in violation.message
    marked = next(line for line in found[4].context if line.startswith(">"))
    assert marked.split() == [">", "11", "F", "s4", "m3", "=", "2,4,F,3,"]


@pytest.mark.parametrize("layout", [ROOTS, BESIDE_THE_HEAD])
@pytest.mark.parametrize("planner", ["gpipe", "one_f_one_b", "auto", "auto_zb"])
@pytest.mark.parametrize("forward_only", [False, True])
def test_planners_know_several_roots(layout, planner, forward_only):
    for microbatches in (5, 8) if forward_only else (1, 2, 5, 8):
        table = plan(planner, layout, microbatches, forward_only=forward_only)
        assert validate(table) == []
        assert read_table(write_table(table, "json")) == table
        assert grid.loads(write_table(table, "grid"), layout) == table
