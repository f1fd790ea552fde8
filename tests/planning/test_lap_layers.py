"""Layers of a two-lap U: both ways to write them, and what is wrong with others."""

from __future__ import annotations

import itertools

import pytest

from ldt_schedules.planning import ScheduleError
from ldt_schedules.planning.lap_layers import LapLayers, frozen_stages, parse_lap_layers
from ldt_schedules.planning.layout import Layout

READABLE = {"vit": [3, 7, 7, 1], "llm": [0, 16, 16, 0]}
ROWS = {"vit": [[3, 7, 7], [1, 0, 0], [0, 0, 0]], "llm": [[0, 0, 0], [0, 16, 16], [0, 0, 0]]}


def test_both_forms_say_the_same():
    layers = parse_lap_layers(READABLE, 18, 32, 3)
    assert layers == parse_lap_layers(ROWS, 18, 32, 3) == LapLayers((3, 7, 7, 1), (0, 16, 16, 0))
    assert parse_lap_layers({"vit": READABLE["vit"], "llm": ROWS["llm"]}, 18, 32, 3) == layers


def test_which_stage_holds_what():
    layers = LapLayers((3, 7, 7, 1), (0, 16, 15, 1))
    assert (layers.num_ranks, layers.num_stages, layers.joining_stage) == (3, 7, 3)
    assert [layers.layers_of(stage) for stage in range(7)] == [
        (3, 0), (7, 0), (7, 0), (1, 0), (0, 16), (0, 15), (0, 1),
    ]  # fmt: skip
    for lap, counts, first in (("vit", layers.vit, 0), ("llm", layers.llm, 3)):
        held = [stage for stage, count in enumerate(counts, first) for _ in range(count)]
        assert [layers.stage_of(lap, layer) for layer in range(sum(counts))] == held
    assert layers.layout() == Layout.laps(3) and layers.layout(2) == Layout.laps(3, 2, domains=2)


def test_an_edge_that_is_alone_holds_all_in_one_stage():
    layers = LapLayers((4,), (5,))
    assert (layers.num_ranks, layers.num_stages, layers.joining_stage) == (1, 1, 0)
    assert layers.layers_of(0) == (4, 5)
    assert layers.stage_of("vit", 3) == layers.stage_of("llm", 4) == 0
    assert layers.layout() == Layout.alone()
    parts = frozenset({"vit", "projector", "language"})
    assert frozen_stages(layers, parts) == {0}
    assert all(not frozen_stages(layers, parts - {part}) for part in parts)


@pytest.mark.parametrize(
    ("vit", "llm"), [((1, 2), (1, 1, 1)), ((5, 1), (1, 2)), ((5, -1, 2), (1, 2, 3)), ((), ()), ((4,), (-3,))]
)
def test_laps_of_no_pipeline_are_refused(vit, llm):
    with pytest.raises(ScheduleError, match=r"P \+ 1 stages"):
        LapLayers(vit, llm)


def test_rows_as_upstream_documents_them():
    """MindSpeed-MM's Qwen2.5-VL-32B: an edge and four cloud ranks."""
    vit = [[3, 7, 7, 7, 7], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    llm = [[0, 0, 0, 0, 0], [0, 16, 16, 16, 16], [0, 0, 0, 0, 0]]
    layers = parse_lap_layers({"vit": vit, "llm": llm}, 32, 64, 5)
    assert layers == LapLayers((3, 7, 7, 7, 7, 1), (0, 16, 16, 16, 16, 0))


def test_every_split_survives_being_written_as_rows():
    for ranks in (2, 3, 4):
        for vit in itertools.product(range(2), repeat=ranks + 1):
            llm = tuple(1 - count for count in vit)
            if not any(vit) or not any(llm):
                continue
            nothing = [0] * ranks
            rows = {
                "vit": [list(vit[:-1]), [vit[-1], *nothing[1:]], nothing],
                "llm": [nothing, list(llm[:-1]), [llm[-1], *nothing[1:]]],
            }
            assert parse_lap_layers(rows, sum(vit), sum(llm), ranks) == LapLayers(vit, llm)


def test_without_a_word_layers_are_split_evenly_and_an_edge_alone_has_all():
    assert parse_lap_layers(None, 4, 5, 3) == LapLayers((1, 1, 1, 1), (1, 2, 1, 1))
    assert parse_lap_layers(None, 4, 5, 1) == LapLayers((4,), (5,))
    assert parse_lap_layers({"vit": [1, 3, 0]}, 4, 5, 2) == LapLayers((1, 3, 0), (1, 2, 2))
    # Fewer layers than places: the edge has one before anything crosses.
    assert parse_lap_layers(None, 3, 1, 4) == LapLayers((1, 0, 1, 1, 0), (1, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2, 1], "needs the layers of both laps"),
        ({"vit": [1, 2, 1], "lm": [1, 2, 1]}, "needs the layers of both laps"),
        (
            {"vit": [1, 2, 2], "llm": [0, 5, 0]},
            r"vit: layers \[1, 2, 2\] add up to 1 \+ 2 \+ 2 = 5, but the model has 4",
        ),
        ({"vit": [1, 2, 1], "llm": [0, 5]}, r"llm: layers \[0, 5\] describe 2 stages, but 2 pipeline ranks have 3"),
        ({"vit": [[1, 2], [1, 0]]}, "vit: .*three rows of 2 counts are needed"),
        ({"vit": [[1, 2, 0], [1, 0], [0, 0]]}, "vit: .*three rows of 2 counts are needed"),
        ({"vit": [[1, 1], [1, 1], [0, 0]]}, "vit: .*may stand in row 1 and the edge's column of row 2 only"),
        ({"vit": [[1, 2], [0, 0], [1, 0]]}, "vit: .*may stand in row 1 and the edge's column of row 2 only"),
        ({"llm": [[1, 0], [0, 4], [0, 0]]}, "llm: .*may stand in row 2 and the edge's column of row 3 only"),
        ({"llm": [[0, 0], [0, 4], [0, 1]]}, "llm: .*may stand in row 2 and the edge's column of row 3 only"),
        ({"llm": [[0, 0], [0, 3], [1, 0]]}, r"llm: .*add up to 0 \+ 3 \+ 1 = 4, but the model has 5"),
        ({"llm": [0, -1, 6]}, "llm: .*-1 is not a number of layers"),
    ],
)
def test_what_cannot_be_is_named(value, message):
    with pytest.raises(ScheduleError, match=message):
        parse_lap_layers(value, 4, 5, 2)


def test_which_stages_have_nothing_to_learn():
    layers = LapLayers((1, 1, 1), (0, 2, 1))  # stages 0 and 1, the joining stage 2, 3 and the tail 4
    expected = {
        (): set(),
        ("vit",): {0, 1},
        ("projector",): set(),
        ("vit", "projector"): {0, 1},
        ("language",): {3, 4},
        ("projector", "language"): {3, 4},
        ("vit", "language"): {0, 1, 3, 4},
    }
    for parts, stages in expected.items():
        assert frozen_stages(layers, frozenset(parts)) == stages, parts
    # Without vision layers on the joining stage its projector and embedding are all it has.
    assert frozen_stages(LapLayers((1, 2, 0), (0, 2, 1)), frozenset({"projector", "language"})) == {2, 3, 4}
