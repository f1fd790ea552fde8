"""M-RoPE positions against transformers' `get_rope_index`, on random samples."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from ldt_schedules.errors import LdtError
from ldt_schedules.megatron.vision_language.mrope import mrope_positions

pytest.importorskip("transformers", reason="transformers is not installed")

IMAGE, VIDEO, PAD = 90, 91, 0
TOKENS = {"image_token": IMAGE, "video_token": VIDEO}


def reference(ids: torch.Tensor, padding: torch.Tensor, samples: list, merge: int, per_second: int) -> torch.Tensor:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    config = SimpleNamespace(
        vision_config=SimpleNamespace(spatial_merge_size=merge, tokens_per_second=per_second),
    )
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = lambda *args, **kwargs: Qwen2_5_VLModel.get_vision_position_ids(
        model, *args, **kwargs
    )
    flat = [one for sample in samples for one in sample]
    images = [grid for token, grid, _ in flat if token == IMAGE]
    videos = [(grid, seconds) for token, grid, seconds in flat if token == VIDEO]
    positions, _ = Qwen2_5_VLModel.get_rope_index(
        model,
        ids,
        (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        torch.tensor(images) if images else None,
        torch.tensor([grid for grid, _ in videos]) if videos else None,
        torch.tensor([seconds for _, seconds in videos]) if videos else None,
        attention_mask=(~padding).long(),
    )
    return positions


def random_samples(draw: random.Random, merge: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    texts, samples = [], []
    for _ in range(draw.randint(1, 3)):
        text, images = [], []
        for _ in range(draw.randint(0, 3)):
            token = draw.choice((IMAGE, VIDEO))
            grid = (
                1 if token == IMAGE else draw.randint(1, 4),
                merge * draw.randint(1, 4),
                merge * draw.randint(1, 4),
            )
            images.append((token, grid, draw.choice((0.25, 0.4, 0.5, 1.0, 1.7))))
            text += draw.choices(range(1, 80), k=draw.randint(1, 4))
            text += [token] * (grid[0] * grid[1] * grid[2] // merge**2)
        text += draw.choices(range(1, 80), k=draw.randint(1, 5))
        texts.append(text)
        samples.append(images)
    length = max(map(len, texts)) + draw.randint(0, 4)
    ids, padding = torch.full((len(texts), length), PAD), torch.ones((len(texts), length), dtype=torch.bool)
    for row, text in enumerate(texts):
        start = draw.choice((0, length - len(text), draw.randint(0, length - len(text))))
        ids[row, start : start + len(text)] = torch.tensor(text)
        padding[row, start : start + len(text)] = False
    return ids, padding, samples


def as_published(theirs: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """What follows a video begins behind its last moment: each run moved there, inside runs nothing changes.

    transformers 5.23 counts on from the video's longer side, as if it had no duration; 4.x and the paper do not.
    """
    moved = theirs.clone()
    for row in range(len(ids)):
        valid = (~padding[row]).nonzero().flatten().tolist()
        runs = [list(run) for _, run in itertools.groupby(valid, key=lambda place: _kind(int(ids[row, place])))]
        free = 0
        for run in runs:
            first = int(theirs[:, row, run].min())
            moved[:, row, run] = theirs[:, row, run] - first + free
            free = int(moved[:, row, run].max()) + 1
    return moved


def _kind(token: int) -> int:
    return token if token in (IMAGE, VIDEO) else -1


def test_text_after_a_long_video_begins_behind_its_last_moment():
    """30 frames a second apart, 2 positions a second: the last stands at 58, the text goes on at 59."""
    ids = torch.tensor([[VIDEO] * 30 + [5, 6]])
    found = mrope_positions(ids, torch.tensor([(30, 2, 2)]), **TOKENS)
    assert found[:, 0, 29].tolist() == [58, 0, 0]
    assert found[:, 0, 30:].tolist() == [[59, 60]] * 3


def test_random_samples_with_images_videos_and_padding():
    draw = random.Random(3)
    for _ in range(300):
        merge, per_second = draw.choice((1, 2, 3)), draw.choice((1, 2, 4, 25))
        ids, padding, samples = random_samples(draw, merge)
        flat = [one for sample in samples for one in sample]
        grids = torch.tensor([grid for _, grid, _ in flat], dtype=torch.int64).view(-1, 3)
        seconds = [seconds for token, _, seconds in flat if token == VIDEO]
        mine = mrope_positions(
            ids,
            grids,
            segments_of(padding),
            padding,
            **TOKENS,
            merge_size=merge,
            tokens_per_second=per_second,
            seconds_per_grid=seconds,
        )
        expected = as_published(reference(ids, padding, samples, merge, per_second), ids, padding)
        assert torch.equal(mine, expected), (samples, ids)


def segments_of(padding: torch.Tensor) -> torch.Tensor:
    """0 for padding at the left, 1 for text, 2 for padding at the right."""
    seen = (~padding).long().cumsum(1) > 0
    return seen.long() + (seen & padding).long()


def test_two_documents_in_a_row_count_each_from_0():
    text, grids = [5, IMAGE, IMAGE, 6], torch.tensor([(1, 2, 4)])
    alone = mrope_positions(torch.tensor([text]), grids, **TOKENS)
    ids = torch.tensor([text + text])
    segments = torch.tensor([[0] * 4 + [1] * 4])
    both = mrope_positions(ids, grids.repeat(2, 1), segments, **TOKENS)
    assert torch.equal(both, torch.cat([alone, alone], dim=2))


def test_two_images_side_by_side():
    ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 6]])
    found = mrope_positions(ids, torch.tensor([(1, 2, 4), (1, 4, 2)]), **TOKENS)
    assert found[:, 0].tolist() == [[0, 1, 1, 3, 3, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 3, 5]]


@pytest.mark.parametrize(
    "ids, grids, said",
    [
        ([5, IMAGE, 6], [(1, 2, 4)], "fewer placeholders"),
        ([5, 6, IMAGE], [(1, 2, 4)], "fewer placeholders"),
        ([5, IMAGE, VIDEO], [(1, 2, 4)], "fewer placeholders"),
        ([5, 6], [(1, 2, 2)], "placeholders for fewer images"),
        ([IMAGE, 6, IMAGE], [(1, 2, 2)], "placeholders for more images"),
    ],
)
def test_placeholders_for_other_images_are_refused(ids, grids, said):
    with pytest.raises(LdtError, match=said):
        mrope_positions(torch.tensor([ids]), torch.tensor(grids), **TOKENS)


def test_seconds_for_too_few_videos_are_refused():
    with pytest.raises(LdtError, match="seconds_per_grid"):
        mrope_positions(torch.tensor([[VIDEO]]), torch.tensor([(1, 2, 2)]), **TOKENS, seconds_per_grid=[])
