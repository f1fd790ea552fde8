"""What the other site tells of a microbatch: formats must refuse by name what they cannot use, and make no huge tensor of it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given

from ldt_schedules.megatron.segments import SegmentedMicrobatches
from ldt_schedules.megatron.vision_language.microbatches import VisionLanguageMicrobatches, packed_positions
from ldt_schedules.mindspeed.mm_microbatches import MmMicrobatches
from ldt_schedules.runtime.told import MAX_TOKENS
from tests.fuzz.mutations import broken_value, everything_once
from tests.fuzz.reading import inputs, read, seeds, show

CPU = torch.device("cpu")
POSITIONS = packed_positions(torch.arange(3 * 2 * 6).reshape(3, 2, 6))
FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "segments": (SegmentedMicrobatches(32), {"segments": [[4, 2], [6]]}),
    "vision language": (
        VisionLanguageMicrobatches(2, 16, 32, CPU),
        {"grids": [[1, 4, 4], [2, 2, 2]], "segments": [[4, 2], [6]], "positions": POSITIONS},
    ),
    "MM": (
        MmMicrobatches(
            joining_stage=2,
            vision_width=16,
            language_width=32,
            dtype=torch.float32,
            device=CPU,
            positions=lambda *_: None,
        ),
        {"text": [2, 6], "grids": [[1, 4, 4]], "attention": [[[1, 6]], [[0, 2], [1, 4]]], "positions": POSITIONS},
    ),
}


def judge(name: str, told: Any) -> bool:
    """Was it accepted?"""
    show(told)
    if not isinstance(told, dict):
        return False  # the header lets no other through
    form, _ = FORMATS[name]
    batch = read(form.in_the_cloud, told)
    for stage in (0, 2):
        shape = read(form.shape, told, stage)
        if batch is not None and shape is not None:
            assert all(type(size) is int and size >= 0 for size in shape)
            assert shape[0] * shape[1] <= MAX_TOKENS
    return batch is not None


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_told_is_understood(name: str) -> None:
    assert judge(name, FORMATS[name][1])


@pytest.mark.parametrize("name", FORMATS)
def test_another_value_everywhere(name: str) -> None:
    accepted = [judge(name, told) for told in everything_once(FORMATS[name][1])]
    assert len(accepted) > 100 and sum(accepted) < len(accepted) / 2


@pytest.mark.parametrize("name", FORMATS)
@inputs(200)
@given(seed=seeds)
def test_slips(name: str, seed: int) -> None:
    judge(name, broken_value(FORMATS[name][1], random.Random(seed)))


@pytest.mark.parametrize("lengths", [[[2**31]], [[2**26, 1]], [[1] * 10, [9]], [[0, 3]], [[-1, 4]], [[True]], [[]], []])
def test_segments_that_are_none(lengths: Any) -> None:
    assert not judge("segments", {"segments": lengths})


def test_a_packed_bomb() -> None:
    """A thousand bytes that become a gigabyte are unpacked no further than the positions are long."""
    import base64
    import zlib

    bomb = base64.b64encode(zlib.compress(bytes(1 << 24), 9)).decode()
    assert not judge("vision language", {**FORMATS["vision language"][1], "positions": bomb})
