"""The layer split: three ways to write it, and every way to write it wrongly."""

from __future__ import annotations

import pytest

from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layers import parse_layers, parse_layout, split_evenly


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("Et*2|t*4|t*4|t*2L", (2, 4, 4, 2)),
        ("Ett|tttt|tttt|ttL", (2, 4, 4, 2)),
        ("Et,(tt|)*2,tL", (3, 2, 1)),
        ("Et|(tt|)*3tL", (1, 2, 2, 2, 1)),
        ("E|t*3|L", (0, 3, 0)),
        ("E||t|L", (0, 0, 1, 0)),
        ("Et|*3tL", (1, 0, 0, 1)),
        ("(Et|)*1 t*3 | tL", (1, 3, 1)),
        ("EtL", (1,)),
        ("Et*0|t*2|L", (0, 2, 0)),
    ],
)
def test_layout_language(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layout(text) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Et|x|tL", "position 4: unknown character 'x'"),
        ("Et|m|tL", "position 4: m (multi-token prediction) is not supported"),
        ("t|t|tL", "must begin with E"),
        ("Et|t|t", "must end with L"),
        ("Et|Et|tL", "position 4: E (embedding) may stand only at the begin"),
        ("EtL|t|tL", "position 3: L (loss) may stand only at the end"),
        ("E*2t|t|tL", "position 1: E (embedding) may stand only at the begin"),
        ("Et*|t|tL", "position 3: * must be followed by a number"),
        ("E*", "position 2: * must be followed by a number"),
        ("*2Et", "position 1: * without something to repeat"),
        ("E(tt|t|tL", "position 2: this bracket is never closed"),
        ("Ett)|t|tL", "position 4: a closing bracket without"),
        ("E((t)*2)*2L", "position 3: a bracket inside the bracket of position 2"),
        ("E(t|)tL", "position 5: a group must be repeated"),
        ("Et*99999999999999999999L", "more than 100000 characters"),
        ("Et*2*2L", "position 5: * without something to repeat"),
        ("", "must begin with E"),
    ],
)
def test_bad_layout_is_named_by_position(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=None) as caught:
        parse_layout(text)
    assert message in str(caught.value)


def test_language_and_list_agree() -> None:
    assert parse_layers([2, 4, 4, 2], 12, 3) == parse_layers("Et*2|t*4|t*4|t*2L", 12, 3) == (2, 4, 4, 2)


def test_language_agrees_with_megatron() -> None:
    layout = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    for text in ("Et*2|t*4|t*4|t*2L", "Et,(tt|)*2,tL", "E||t|L", "Et|*3tL"):
        stages = layout.PipelineParallelLayerLayout.parse_str_to_list(text)
        assert parse_layout(text) == tuple(sum(layer.name == "decoder" for layer in stage) for stage in stages)


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "layers"),
    [
        (8, 4, (2, 2, 2, 2)),
        (9, 4, (2, 3, 2, 2)),
        (10, 4, (2, 3, 3, 2)),
        (11, 4, (2, 3, 3, 3)),
        (1, 3, (0, 1, 0)),
        (5, 1, (5,)),
    ],
)
def test_even_split_favours_the_cloud(num_layers: int, num_stages: int, layers: tuple[int, ...]) -> None:
    assert split_evenly(num_layers, num_stages) == layers


def test_default_has_one_stage_more_than_ranks() -> None:
    for ranks in range(2, 8):
        for num_layers in range(1, 20):
            layers = parse_layers(None, num_layers, ranks)
            assert len(layers) == ranks + 1
            assert sum(layers) == num_layers
            assert max(layers) - min(layers) <= 1


def test_edge_alone_takes_one_number() -> None:
    assert parse_layers(None, 8, 1) == parse_layers(8, 8, 1) == parse_layers([8], 8, 1) == (8,)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ([2, 4, 4, 2], ["2 + 4 + 4 + 2 = 12", "8 layers", "take away 4", "to 12"]),
        ([1, 2, 2, 1], ["= 6", "8 layers", "add 2"]),
        ([4, 4], ["2 stages", "3 pipeline ranks have 4", "head, cloud 1..2, tail"]),
        ([2, -1, 5, 2], ["-1 is not a number of layers"]),
        ([2, True, 4, 1], ["True is not a number of layers"]),
        ([2, 2.0, 2, 2], ["2.0 is not a number of layers"]),
        (8, ["1 stages", "3 pipeline ranks have 4"]),
    ],
)
def test_bad_lists_say_what_to_change(value: object, parts: list[str]) -> None:
    with pytest.raises(ScheduleError) as caught:
        parse_layers(value, 8, 3)  # type: ignore[arg-type]
    for part in parts:
        assert part in str(caught.value)


def test_nonsense_sizes() -> None:
    with pytest.raises(ScheduleError, match="at least 1 layer and 1 pipeline rank"):
        parse_layers(None, 0, 3)
