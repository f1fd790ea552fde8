"""The CSV of torch.distributed.pipelining: what we write is read back, by us and by torch."""

from __future__ import annotations

import csv

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldt_schedules.planning import (
    Action,
    Layout,
    ScheduleError,
    ScheduleTable,
    Stage,
    check,
    plan,
    read_table,
    write_table,
)
from ldt_schedules.planning.formats import torch_csv
from ldt_schedules.planning.planners import plan_problem
from ldt_schedules.planning.problem import Problem

SIZES = [(ranks, microbatches) for ranks in range(2, 6) for microbatches in range(1, 9)]
TEXT = write_table(plan("ldt_1f1b", Layout.u(3), 2), "csv")


def tables(ranks, microbatches):
    layout = Layout.u(ranks)
    for name in ("ldt_1f1b", "gpipe"):
        for forward_only in (False, True):
            yield plan(name, layout, microbatches, forward_only)


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_round_trip(ranks, microbatches):
    for table in tables(ranks, microbatches):
        assert read_table(write_table(table, "csv")) == table


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_torch_reads_it(ranks, microbatches):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    for table in tables(ranks, microbatches):
        read = {}
        for rank, row in enumerate(csv.reader(write_table(table, "csv").splitlines())):
            read[rank] = [schedules._Action.from_str(cell) for cell in row]
            assert [str(action) for action in read[rank]] == row
            for theirs, ours in zip(read[rank], table.ranks[rank], strict=True):
                assert theirs.stage_index == ours.stage and (theirs.microbatch_index,) == ours.microbatches
                assert theirs.computation_type.value == ours.kind.value
        if not table.forward_only:
            where = schedules._validate_schedule(read, ranks, ranks + 1, microbatches)
            assert where == {stage.index: stage.ranks[0] for stage in table.layout.stages}


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 3), (3, 5), (4, 8)])
def test_torch_puts_the_same_messages_in(ranks, microbatches):
    """torch's own lowering of our computations sends what we send, on every lane in the same order."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    table = plan("ldt_1f1b", Layout.u(ranks), microbatches)
    compute = {
        rank: [schedules._Action.from_str(f"{a.stage}{a.kind}{a.microbatches[0]}") for a in row]
        for rank, row in enumerate(table.compute_order())
    }
    lowered = schedules._add_send_recv(compute, lambda stage: stage % ranks, ranks + 1)
    text = "".join(",".join(map(str, lowered[rank])) + "\n" for rank in range(ranks))
    theirs = read_table(text)
    check(theirs)
    for mine, other in zip(table.ranks, theirs.ranks, strict=True):
        assert set(mine) == set(other)


def test_split_backwards():
    table = plan_problem("auto_zb", Problem(Layout.u(3), 5))
    text = write_table(table, "csv")
    assert "0W4" in text and read_table(text) == table


def test_another_layout_is_given():
    layout = Layout.laps(3)
    table = plan("ldt_2lap_1f1b", layout, 4)
    text = write_table(table, "csv")
    assert torch_csv.loads(text, layout) == table
    with pytest.raises(ScheduleError, match="stage 3 is the last of the layout"):
        read_table(text)


def test_what_torch_writes_beside_actions():
    """Bubbles, line ends, quotes and the actions of sharded parameters."""
    text = TEXT.replace("0F0,", '"0F0", ,0UNSHARD,0RESHARD,0REDUCE_GRAD,', 1).replace("\n", "\r\n")
    assert read_table("," + text) == read_table(TEXT)


def test_a_rank_with_nothing_to_do():
    layout = Layout((Stage(0, "a", (0,), ()), Stage(1, "b", (2,), (0,))), num_ranks=3)
    table = plan("one_f_one_b", layout, 2)
    text = torch_csv.dumps(table)
    assert text.splitlines()[1] == ""
    assert torch_csv.loads(text, layout) == table


SEVERAL_ROOTS = Layout((Stage(0, "a", (0,), ()), Stage(1, "b", (1,), ()), Stage(2, "c", (0,), (0, 1))))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout.u(3, domains=2), "stage 1 stands on ranks 1, 3, one for each domain"),
        (SEVERAL_ROOTS, "stage 1 reads from no other stage"),
    ],
)
def test_layouts_with_ambiguous_peers(layout, message):
    table = ScheduleTable.from_rows(layout, 1, [[]] * layout.num_ranks)
    for attempt in (lambda: write_table(table, "csv"), lambda: torch_csv.loads("0F0\n1F0\n", layout)):
        with pytest.raises(ScheduleError, match=message):
            attempt()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("F s0 m(0,1)", "rank 0, action 0 .* this one is packed"),
        ("SEND_F s0 m0 ->1/s1", "cannot say that the other end is stage 1"),
        ("SEND_F s0 m0 ->2", "would be read as one for rank 1"),
        ("SEND_F s3 m0 ->1", "stage 3 is the last"),
        ("SEND_F s9 m0 ->1", "no stage 9"),
    ],
)
def test_what_cannot_be_written(action, message):
    table = ScheduleTable.from_rows(Layout.u(3), 2, {0: [Action.parse(action)]})
    with pytest.raises(ScheduleError, match=message):
        write_table(table, "csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,1X0\n1F0\n", "line 1, cell 2 ('1X0'): cannot read it"),
        ("0F\n1F0\n", "line 1, cell 1 ('0F'): cannot read it"),
        ("0F0\n2F0\n", "line 2, cell 1 ('2F0'): stage 2 stands on rank 0, this is the line of rank 1"),
        ("0F0\n1F0,1F99999999999\n", "line 2, cell 2"),
        ("0F0,(0F1;2B0)OVERLAP_F_B\n1F0\n", "a forward and a backward at one time"),
        ("0F0,0RECV_F0\n1F0\n", "stage 0 is the first"),
        ("0F0\n", "at least 2 pipeline ranks"),
        ("0UNSHARD\n1UNSHARD\n", "at least 1 microbatch"),
        ("0F0," + "9" * 200_000, "this is no CSV"),
        ("1F0\r1F0,\r\n", "line 1, cell 1"),
        ("0X0,0F0", "this is no table"),
    ],
)
def test_broken_files(text, message):
    with pytest.raises(ScheduleError) as caught:
        read_table(text)
    assert message in str(caught.value)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(TEXT)),
            st.integers(0, 6),
            st.one_of(st.text(max_size=3), st.sampled_from('0,"\n\rFBIW_;(\0')),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_files_raise_nothing_else(changes):
    text = TEXT
    for place, length, new in changes:
        text = text[:place] + new + text[place + length :]
    for read in (read_table, torch_csv.loads):
        try:
            table = read(text)
        except ScheduleError:
            continue
        assert isinstance(table, ScheduleTable)
