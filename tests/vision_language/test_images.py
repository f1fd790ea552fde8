"""The structure of images against transformers' own, on every small grid and on mixtures of them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from ldt_schedules.errors import LdtError
from ldt_schedules.megatron.vision_language.images import image_structure

vision_utils = pytest.importorskip("transformers.vision_utils", reason="transformers is not installed")

SIDES = range(1, 8)
"""In tokens."""
PATCH = 3


def check(grids: list[tuple[int, int, int]], merge: int, window: int) -> None:
    given = torch.tensor(grids)
    order, window_ends = vision_utils.get_vision_window_index(given, merge, window * merge * PATCH, PATCH)
    frame_ends, _ = vision_utils.get_vision_attention_seqlens(given, _Config())
    positions = vision_utils.get_vision_position_ids(given, merge)
    mine = image_structure(given, merge, window)
    assert torch.equal(mine.order, order), grids
    assert torch.equal(mine.order[mine.inverse], torch.arange(len(order)))
    for row, ends in zip(mine.segments, (window_ends, frame_ends), strict=True):
        assert torch.equal(row, numbers(ends)), grids
    in_window_order = positions.view(-1, merge**2, 2)[order].view(-1, 2)
    assert torch.equal(mine.positions.t(), in_window_order), grids


class _Config:
    """All that is asked of a config here: not to count the longest segment for flash attention."""

    _attn_implementation = "sdpa"


def numbers(ends: torch.Tensor) -> torch.Tensor:
    """`[0, 4, 6]` -> `[0, 0, 0, 0, 1, 1]`."""
    lengths = (ends[1:] - ends[:-1]).long()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


@pytest.mark.parametrize("merge, window", [(1, 1), (1, 3), (2, 1), (2, 2), (2, 4), (3, 2)])
def test_every_small_image_and_video(merge, window):
    for frames, rows, columns in itertools.product((1, 2, 3), SIDES, SIDES):
        check([(frames, rows * merge, columns * merge)], merge, window)


def test_mixtures_of_images_and_videos():
    draw = random.Random(1)
    for _ in range(200):
        merge, window = draw.choice([(1, 2), (2, 2), (2, 4), (3, 1)])
        sides = [(draw.choice((1, 1, 2, 4)), draw.choice(SIDES), draw.choice(SIDES)) for _ in range(draw.randint(2, 5))]
        check([(frames, rows * merge, columns * merge) for frames, rows, columns in sides], merge, window)


def test_no_images():
    nothing = image_structure(torch.zeros((0, 3), dtype=torch.int64), 2, 4)
    assert nothing.num_patches == 0
    assert [list(part.shape) for part in (nothing.order, nothing.inverse)] == [[0], [0]]
    assert [list(part.shape) for part in (nothing.segments, nothing.positions)] == [[2, 0], [2, 0]]


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 4, 3), (0, 4, 4), (1, 0, 4)])
def test_a_side_that_cannot_be_merged_is_refused(grid):
    with pytest.raises(LdtError, match="multiples of merge_size, 2"):
        image_structure(torch.tensor([grid]), 2, 4)


def test_stages_share_one_structure():
    grids = torch.tensor([(1, 4, 6)])
    assert image_structure(grids, 2, 2) is image_structure(grids.clone(), 2, 2)
