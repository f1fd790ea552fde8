"""Actions read and print; layouts refuse what cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldt_schedules.planning import Action, Kind, Layout, ScheduleError, Stage

ACTIONS = st.builds(
    lambda kind, stage, microbatches, peer: Action(kind, stage, microbatches, None if kind.is_compute else peer),
    st.sampled_from(Kind),
    st.integers(0, 200),
    st.lists(st.integers(0, 999), min_size=1, max_size=4, unique=True).map(tuple),
    st.integers(0, 99),
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
        ((Stage(0, "a", (0,), (0,)),), "does not come before it"),
        ((Stage(0, "a", (1,), ()),), "without gaps"),
        ((Stage(0, "a", (), ()),), "no rank"),
        (
            (Stage(0, "a", (0,), ()), Stage(1, "b", (1,), (0,)), Stage(2, "c", (1,), (0,))),
            "two neighbours on one rank",
        ),
    ],
)
def test_impossible_layouts_are_refused(stages, message):
    with pytest.raises(ScheduleError, match=message):
        Layout(stages)


def test_an_edge_alone_is_no_u():
    with pytest.raises(ScheduleError, match="at least 2 pipeline ranks"):
        Layout.u(1)
