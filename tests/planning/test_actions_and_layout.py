"""Actions read and print; layouts refuse what cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldt_schedules.planning import Action, Kind, Layout, ScheduleError, ScheduleTable, Stage

ACTIONS = st.builds(
    lambda kind, stage, microbatches, ends: Action(kind, stage, microbatches, *(() if kind.is_compute else ends)),
    st.sampled_from(Kind),
    st.integers(0, 200),
    st.lists(st.integers(0, 999), min_size=1, max_size=4, unique=True).map(tuple),
    st.tuples(st.integers(0, 99), st.none() | st.integers(0, 200)),
)


@given(ACTIONS)
def test_an_action_reads_as_it_prints(action):
    assert Action.parse(str(action)) == action


NO_ACTIONS = (
    [
        "",
        "F",
        "F s0",
        "F s0 m",
        "F s0 m0 x",
        "FOO s0 m0",
        "F s-1 m0",
        "F s0 m()",
        "F s0 m(0)",
        "F s0 m0 ->1",
        "f s0 m0",
        "F s0 m0/s1",
        "SEND_F s0 m0 ->1/s",
        "SEND_F s0 m0 ->1/1",
    ],
    ["SEND_F s0 m0", "SEND_F s0 m0 <-1", "RECV_F s0 m0 ->1", "F s0 m(0,0)", "F  s0 m0", "F s0 m" + "9" * 5000],
)


@pytest.mark.parametrize("text", [text for row in NO_ACTIONS for text in row])
def test_what_is_no_action_is_refused(text):
    """A prefix that happens to match is not enough: torch's own parser reads "0FOO" as 0F."""
    with pytest.raises(ScheduleError):
        Action.parse(text)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_the_u(ranks):
    layout = Layout.u(ranks)
    assert [stage.ranks for stage in layout.stages] == [(s % ranks,) for s in range(ranks + 1)]
    assert layout.stages_on(0) == (0, ranks) and layout.num_ranks == ranks and layout.num_domains == 1
    assert layout.is_head(0) and layout.is_tail(ranks)
    assert not any(layout.is_head(s) or layout.is_tail(s) for s in range(1, ranks))
    assert [layout.consumers(s) for s in range(ranks + 1)] == [(s + 1,) for s in range(ranks)] + [()]


def test_domains_share_out_microbatches():
    layout = Layout((Stage(0, "head", (0,), ()), Stage(1, "cloud", (1, 2), (0,)), Stage(2, "tail", (0,), (1,))))
    assert layout.num_domains == 2
    assert [layout.rank_of(1, m) for m in range(4)] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "at least one stage"),
        ((Stage(1, "a", (0,), ()),), "number stages"),
        ((Stage(0, "a", (0,), (0,)),), r"stages \[0\] wait for each other: the graph of stages has a cycle"),
        (
            (Stage(0, "a", (0,), ()), Stage(1, "b", (1,), (0, 2)), Stage(2, "c", (2,), (1,))),
            r"stages \[1, 2\] wait for each other",
        ),
        ((Stage(0, "a", (0,), ()), Stage(1, "b", (1,), (7,))), "stage 1 takes its input from stage 7"),
        ((Stage(0, "a", (1,), ()),), "without gaps"),
        ((Stage(0, "a", (), ()),), "no rank"),
        (
            (Stage(0, "a", (0,), ()), Stage(1, "b", (1, 2), (0,)), Stage(2, "c", (1, 2, 3), (1,))),
            "the same number of ranks",
        ),
    ],
)
def test_impossible_layouts_are_refused(stages, message):
    with pytest.raises(ScheduleError, match=message):
        Layout(stages)


@pytest.mark.parametrize("domain_of", [(0,), (0, 1, 0)])
def test_a_domain_for_each_microbatch_of_a_table(domain_of):
    layout = Layout(Layout.u(2, domains=2).stages, 3, domain_of)
    with pytest.raises(ScheduleError, match=f"domain_of has {len(domain_of)} entries for 2 microbatches"):
        ScheduleTable.from_rows(layout, 2, [[], [], []])


def test_a_rank_and_a_domain_that_do_not_exist():
    chain = (Stage(0, "a", (0,), ()), Stage(1, "b", (3,), (0,)))
    with pytest.raises(ScheduleError, match=r"stage 1 stands on rank 3, which does not exist; ranks are 0\.\.1"):
        Layout(chain, 2)
    assert Layout(chain, 4).has_idle_ranks
    shared = (Stage(0, "a", (0,), ()), Stage(1, "b", (1, 2), (0,)))
    with pytest.raises(ScheduleError, match=r"microbatch 1 is of domain 2; there are domains 0\.\.1"):
        Layout(shared, 3, (0, 2))
    assert [Layout(shared, 3, (1, 1, 0)).rank_of(1, m) for m in range(3)] == [2, 2, 1]


def test_several_neighbours_may_stand_on_one_rank():
    layout = Layout((Stage(0, "a", (0,), ()), Stage(1, "b", (1,), (0,)), Stage(2, "c", (1,), (0,))))
    assert layout.consumers(0) == (1, 2)
    assert layout.neighbours_on(layout.consumers(0), 1, 0) == [1, 2]


def test_stages_need_not_be_numbered_in_forward_order():
    layout = Layout((Stage(0, "last", (0,), (1,)), Stage(1, "middle", (1,), (2,)), Stage(2, "first", (0,), ())))
    assert layout.forward_order == (2, 1, 0)
    assert layout.is_head(2) and layout.is_tail(0)


@pytest.mark.parametrize("ranks", range(2, 6))
@pytest.mark.parametrize("laps", [1, 2, 3])
@pytest.mark.parametrize("domains", [1, 2])
def test_laps_go_round_the_ring(ranks, laps, domains):
    layout = Layout.laps(ranks, laps, domains)
    assert len(layout.stages) == laps * ranks + 1 and layout.num_ranks == 1 + domains * (ranks - 1)
    rings = layout.rings(laps)
    assert rings == [(0, *range(1 + d * (ranks - 1), 1 + (d + 1) * (ranks - 1))) for d in range(domains)]
    assert [layout.rank_of(s, domains - 1) for s in range(ranks + 1)] == [*rings[-1], 0]
    assert layout.rings(laps + 1) is None or laps * ranks % (laps + 1) == 0


ROOTS = Layout.roots({"audio": 0, "vision": 1, "text": 2}, {"join": 3, "middle": 4, "last": 5})
BESIDE_THE_HEAD = Layout.roots({"audio": 0, "vision": 0}, {"head": 0, "cloud1": 1, "cloud2": 2, "tail": 0})


def test_several_roots_feed_a_chain():
    assert [stage.name for stage in ROOTS.stages] == ["audio", "vision", "text", "join", "middle", "last"]
    assert [stage.inputs for stage in ROOTS.stages] == [(), (), (), (0, 1, 2), (3,), (4,)]
    assert [stage.ranks for stage in ROOTS.stages] == [(rank,) for rank in range(6)]
    assert [stage.number for stage in ROOTS.stages] == [0, 0, 0, 1, 2, 3]
    assert [ROOTS.is_head(s) for s in range(6)] == [True] * 3 + [False] * 3


def test_encoders_beside_the_head_of_a_u():
    """All three roots of rank 0 cannot be called stage 0: the cells of a grid would not tell them apart."""
    assert BESIDE_THE_HEAD.stages_on(0) == (0, 1, 2, 5) and BESIDE_THE_HEAD.num_ranks == 3
    assert [stage.inputs for stage in BESIDE_THE_HEAD.stages] == [(), (), (0, 1), (2,), (3,), (4,)]
    assert [stage.label for stage in BESIDE_THE_HEAD.stages] == [None] * 6


@pytest.mark.parametrize(
    ("roots", "chain", "message"),
    [
        ({}, {"join": 0}, "there is no root"),
        ({"text": 0}, {}, "the chain is empty"),
        ({"text": 0, "join": 1}, {"join": 2}, "'join' is a root and a stage of the chain"),
        ({"text": 0}, {"join": 2}, "without gaps"),
    ],
)
def test_roots_that_are_no_layout(roots, chain, message):
    with pytest.raises(ScheduleError, match=message):
        Layout.roots(roots, chain)


def test_labels_tell_the_stages_of_a_rank_apart():
    assert Stage(1, "b", (0,), (), 1) == Stage(1, "b", (0,), ())
    with pytest.raises(ScheduleError, match="stages 1 and 2 of rank 0 are both called 2; give them labels that differ"):
        Layout((Stage(0, "a", (0,), ()), Stage(1, "b", (0,), (0,), 2), Stage(2, "c", (0,), (1,))))
    with pytest.raises(ScheduleError, match="stage 0 has the label -1"):
        Layout((Stage(0, "a", (0,), (), -1),))


def test_the_same_work_whatever_stages_are_called():
    renamed = Layout(tuple(Stage(s.index, "x", s.ranks, tuple(reversed(s.inputs))) for s in ROOTS.stages))
    assert renamed != ROOTS and renamed.same_work(ROOTS)
    assert not ROOTS.same_work(BESIDE_THE_HEAD)
    assert not ROOTS.same_work(Layout(ROOTS.stages, 7))


def test_an_edge_alone_is_no_u():
    with pytest.raises(ScheduleError, match="at least 2 pipeline ranks"):
        Layout.u(1)
    with pytest.raises(ScheduleError, match="at least 1 lap, got 0"):
        Layout.laps(2, 0)
    with pytest.raises(ScheduleError, match="at least 1 domain, got 0"):
        Layout.u(2, 0)
