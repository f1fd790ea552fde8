"""Files that are broken: one message that says where, never a traceback."""

from __future__ import annotations

import json

import pytest

from ldt_schedules.planning import Layout, ScheduleError, Stage, plan, read_table, table_hash, write_table
from ldt_schedules.planning.formats import grid

TABLE = plan("ldt_1f1b", Layout.u(3), 2)
TEXT = write_table(TABLE, "json")


@pytest.mark.parametrize("length", range(0, len(TEXT) - 2, 41))
def test_a_file_cut_off_anywhere_is_refused(length):
    with pytest.raises(ScheduleError):
        read_table(TEXT[:length])


def altered(**changes):
    return json.dumps({**json.loads(TEXT), **changes})


def with_action(text):
    content = json.loads(TEXT)
    content["ranks"]["1"][2] = text
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT[:200], "cut off"),
        ("", "the file is empty"),
        ("hello", "this is no table"),
        ("[]", "this is no table"),
        ("{}", "ldt-table/1"),
        (altered(format="ldt-table/9"), "'ldt-table/9', expected \"ldt-table/1\""),
        (altered(extra=1), "unknown key 'extra'"),
        (altered(num_microbatches="two"), "\"num_microbatches\" is 'two'; expected a whole number"),
        (altered(num_microbatches=0), "at least 1 microbatch"),
        (altered(stages=[]), "at least one stage"),
        (altered(stages=[{"stage": 0, "rank": "x"}]), "stage number 0: \"rank\" is 'x'"),
        (altered(stages=[{"stage": 0, "rank": 0, "label": "x"}]), "\"label\" is 'x'; expected a whole number"),
        (altered(stages=7), '"stages" is 7; expected a list'),
        (altered(ranks={"7": []}), "7; the stages stand on ranks 0..2"),
        (altered(ranks={"0": "F s0 m0", "1": [], "2": []}), "rank 0: expected a list"),
        (altered(forward_only="no"), "true and false"),
        (with_action("FORWARD s1 m0"), "rank 1, action 2: cannot read action 'FORWARD s1 m0'"),
        (with_action(3), "rank 1, action 2: cannot read action"),
        (with_action("SEND_F s1 m0"), "names no peer"),
        (with_action("F s1 m" + "9" * 5000), "rank 1, action 2: cannot read action"),
        (TEXT.replace('"num_microbatches": 2', '"num_microbatches": ' + "9" * 5000), "this cannot be read"),
        (TEXT.replace('"forward_only"', '"x"').replace('"1": [', '"0": ['), "the key '0' stands twice"),
        (altered(ranks={"0": []}), '"ranks" has no row for 1, 2'),
        ("Rank 0 Rank 1\nnonsense", "line 2: expected 'Step NN"),
        ("Rank 0 Rank 1\nStep 00: 0,0,F,x,", "line 2: cannot read the cell '0,0,F,x,'"),
        ("Rank 0 Rank 1\nStep 00: 0,0,SEND_F,(0,),", "names no peer"),
        ("Rank 0 Rank 1\nStep 00: 0,5,F,0,", "the grid has 2 columns"),
        ("Rank 0 Rank 1\nStep 00: 0,0,F,0, 0,1,F,0,", "of stage 0 of rank 0: no message joins it to another stage"),
    ],
)
def test_broken_files(text, message):
    with pytest.raises(ScheduleError) as caught:
        read_table(text)
    assert message in str(caught.value)


def test_the_hash_is_of_the_contents():
    assert table_hash(TABLE) == table_hash(read_table(TEXT)) == table_hash(read_table(write_table(TABLE, "grid")))
    assert table_hash(TABLE) != table_hash(plan("gpipe", Layout.u(3), 2))
    assert len(table_hash(TABLE)) == 64


def test_diff_names_rank_and_action():
    other = plan("gpipe", Layout.u(3), 2)
    assert TABLE.diff(TABLE) == ""
    assert "rank 0" in TABLE.diff(other) and "\n+" in TABLE.diff(other)


def test_stages_with_several_neighbours_on_one_rank_are_kept_or_refused():
    """The peer is written `->1/s2` then; a format that has no place for the stage must not drop it without a word."""
    fork = Layout((Stage(0, "root", (0,), ()), Stage(1, "a", (1,), (0,)), Stage(2, "b", (1,), (0,))))
    table = plan("gpipe", fork, 2)
    assert read_table(write_table(table, "json")) == table
    try:
        text = write_table(table, "grid")
    except ScheduleError:
        return
    assert grid.loads(text, fork) == table


def test_no_such_format():
    with pytest.raises(ScheduleError, match="there are json, grid"):
        write_table(TABLE, "xml")
