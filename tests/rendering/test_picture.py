"""Gantt charts: every computation is a box of its length on its rank, with what a reader needs to read it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ldt_schedules.planning import Action, Costs, Layout, plan, simulate
from ldt_schedules.planning.formats.trace_json import Trace
from ldt_schedules.planning.timeline import Timeline
from ldt_schedules.rendering.panel import Panel, format_time
from ldt_schedules.rendering.text import timeline_lines

pytest.importorskip("matplotlib")

from ldt_schedules.rendering.picture import MAX_ARROWS, draw_figure, picture_bytes


def panel(planner="ldt_1f1b", ranks=4, microbatches=8, unit="forwards", bound=None, **costs):
    layout = Layout.u(ranks)
    table = plan(planner, layout, microbatches)
    timeline = simulate(layout, table.ranks, Costs(**costs))
    return Panel(planner, Trace(layout, microbatches, timeline, unit), bound)


def split_by_hand():
    """One microbatch through a U of 2 ranks; the backwards of head and cloud are split."""
    layout = Layout.u(2)
    rows = [["F s0 m0", "F s2 m0", "B s2 m0", "I s0 m0", "W s0 m0"], ["F s1 m0", "I s1 m0", "W s1 m0"]]
    timeline = simulate(layout, [[Action.parse(text) for text in row] for row in rows], Costs(latency=2))
    return Panel("split", Trace(layout, 1, timeline, "forwards"))


def boxes(figure, name="spans"):
    """(rank, start, end) of every box, by the name of its colour."""
    found = {}
    for axes in figure.axes:
        for collection in axes.collections:
            if (collection.get_gid() or "").startswith(name):
                corners = [path.vertices for path in collection.get_paths()]
                found[collection.get_gid()] = [
                    (round((c[:, 1].min() + c[:, 1].max()) / 2), c[:, 0].min(), c[:, 0].max()) for c in corners
                ]
    return found


def heads(axes):
    return sum(len(c.get_offsets()) for c in axes.collections if type(c).__name__ == "PathCollection")


def test_each_span_is_one_box_at_its_place():
    shown = panel(latency=2)
    drawn = boxes(draw_figure([shown]))
    spans = sorted((span.rank, span.start, span.end) for span in shown.trace.timeline.spans)
    assert sorted(box for group in drawn.values() for box in group) == spans  # whole numbers
    assert {name: len(group) for name, group in drawn.items()} == {
        "spans-0-F-first": 32, "spans-0-F-tail": 8, "spans-0-B-first": 32, "spans-0-B-tail": 8,
    }  # fmt: skip
    assert {rank for rank, _, _ in drawn["spans-0-F-tail"]} == {0}


def test_the_svg_names_ranks_and_microbatches():
    svg = picture_bytes([panel(latency=2, bound=48.0)], "svg").decode()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    for label in ("edge", "cloud 1", "cloud 2", "cloud 3", "forward, tail", "gradient", "proven lower bound"):
        assert label in texts
    assert any(
        text.startswith("ldt_1f1b: makespan 61 forwards, bubble 50.8%, lower bound 48 forwards") for text in texts
    )
    assert "time (forwards)" in texts
    for m in range(1, 8):  # 0 also stands on the axis
        assert texts.count(str(m)) == 2 * 5, m
    assert picture_bytes([panel(latency=2, bound=48.0)], "svg").decode() == svg


def test_numbers_are_left_out_where_they_do_not_fit():
    texts = [text.get_text() for text in draw_figure([panel(ranks=2, microbatches=500)]).axes[0].texts]
    assert [text for text in texts if text.isdigit()] == []
    assert texts == ["idle 0%", "idle 50%"]


def test_input_and_weight_gradients_have_colours_of_their_own():
    figure = draw_figure([split_by_hand()])
    drawn = boxes(figure)
    assert len(drawn["spans-0-I-first"]) == len(drawn["spans-0-W-first"]) == 2
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"input gradient", "weight gradient", "backward, tail"} <= set(legend)
    assert "backward" not in legend and "proven lower bound" not in legend


def test_every_message_is_an_arrow_until_they_are_too_many():
    few, many = panel(latency=2), panel(ranks=8, microbatches=32)
    assert heads(draw_figure([few]).axes[0]) == len(few.trace.timeline.transfers)
    figure = draw_figure([many])
    assert 0 < heads(figure.axes[0]) <= MAX_ARROWS < len(many.trace.timeline.transfers)
    assert "activation (1 microbatch in 3)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_steps_below_each_other_share_the_scale_of_their_unit():
    short, long, measured = panel("gpipe", latency=2), panel(latency=2), panel(unit="s", forward=0.001, backward=0.002)
    axes = draw_figure([short, long, measured]).axes
    assert axes[0].get_xlim() == axes[1].get_xlim() == (0, 61)
    assert axes[2].get_xlim() == pytest.approx((0, measured.trace.timeline.makespan * 1000))
    assert [ax.get_xlabel() for ax in axes] == ["time (forwards)", "time (forwards)", "time (ms)"]
    assert [ax.get_title(loc="left").split(":")[0] for ax in axes] == ["gpipe", "ldt_1f1b", "ldt_1f1b"]


def test_the_bound_is_a_line_and_idle_time_is_shaded():
    figure = draw_figure([panel("gpipe", latency=2, bound=48.0)])
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [48.0, 48.0]
    assert boxes(figure, "idle")["idle-0"] == [(rank, 0, 48) for rank in range(4)]


def test_a_step_without_work_can_be_drawn():
    layout = Layout.u(2)
    empty = Panel("nothing", Trace(layout, 1, Timeline(2, ()), "s"))
    assert picture_bytes([empty], "png").startswith(b"\x89PNG")
    assert "makespan 0 s" in empty.heading


@pytest.mark.parametrize(
    ("time", "unit", "text"),
    [(0.0412, "s", "41.2 ms"), (3e-5, "s", "30 µs"), (2.5, "s", "2.5 s"), (41, "forwards", "41 forwards")],
)
def test_times_are_told_in_readable_units(time, unit, text):
    assert format_time(time, unit) == text


def test_the_text_picture_explains_split_backwards_only_where_there_are_some():
    split = timeline_lines(split_by_hand().trace.layout, split_by_hand().trace.timeline)
    assert "I0" in split[0] and "W0" in split[0] and split[-1].startswith("I, W the backward in two")
    plain = timeline_lines(panel().trace.layout, panel().trace.timeline)
    assert plain[-1].startswith("F forward, B backward")


def test_the_text_picture_tells_the_stages_of_a_rank_apart():
    """Two laps, and three encoders on one rank; each stage's letter is of its own."""
    from ldt_schedules.planning import Layout, plan, simulate

    def drawn(layout):
        return timeline_lines(layout, simulate(layout, plan("gpipe", layout, 1).ranks), width=400)

    edge, cloud, *rest = drawn(Layout.laps(2, 2))
    assert "".join(c for c in edge.removeprefix("edge") if c.isalpha()) == "FGTtCB"
    assert "".join(c for c in cloud.removeprefix("cloud 1") if c.isalpha()) == "FGCB"
    assert rest[-1] == "G, C those of a rank's second stage"
    roots = Layout.roots({"a": 0, "b": 0, "c": 0}, {"head": 0, "middle": 1, "tail": 0})
    edge, *rest = drawn(roots)
    assert [edge.count(letter) for letter in "FGHTtBCD"] == [1, 1, 2, 1, 1, 1, 1, 2]
    assert rest[-1] == "G, C those of a rank's second stage, H, D of the third and later ones"
    assert not any("second stage" in line for line in drawn(Layout.u(3)))


def test_without_matplotlib_the_message_names_the_extra():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from ldt_schedules.rendering.picture import check_available\n"
        "try: check_available()\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("ScheduleError") and "pip install 'ldt-schedules[plot]'" in done.stdout, done.stderr
