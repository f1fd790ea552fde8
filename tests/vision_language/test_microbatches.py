"""What the step header tells of a vision-language microbatch: enough for the middle layers, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch

from ldt_schedules.megatron.vision_language.microbatches import VisionLanguageMicrobatches
from tests.parity.vision import vision_batches
from tests.vision_language import tiny

FORMAT = VisionLanguageMicrobatches(3, vision_width=16, language_width=32, device=torch.device("cpu"))


def batches():
    yield from (tiny.microbatch(samples) for samples in tiny.BATCHES.values())
    yield from vision_batches(0, range(8))


def test_the_cloud_knows_what_its_layers_need():
    for batch in batches():
        told = json.loads(json.dumps(FORMAT.told(batch)))
        cloud = FORMAT.in_the_cloud(told)
        assert cloud.keys() == {"grids", "segments", "position_ids"}
        assert torch.equal(cloud["grids"], batch["grids"]) and torch.equal(cloud["position_ids"], batch["position_ids"])
        for mine, theirs in zip(cloud["segments"], batch["segments"], strict=True):
            assert torch.equal(mine[:, None] == mine, theirs[:, None] == theirs), "who attends to whom has changed"


def test_shapes_of_both_laps():
    for batch in batches():
        told = FORMAT.told(batch)
        samples, length = batch["input_ids"].shape
        assert [FORMAT.shape(told, stage) for stage in (0, 1, 2)] == [(len(batch["pixel_values"]), 1, 16)] * 3
        assert [FORMAT.shape(told, stage) for stage in (3, 4, 5)] == [(length, samples, 32)] * 3


def test_tokens_labels_and_pixels_change_nothing_of_it():
    """So nothing of them can be in it."""
    for batch in batches():
        other = {
            **batch,
            "input_ids": batch["input_ids"].roll(1, 1),
            "labels": batch["labels"] + 1,
            "loss_mask": 1 - batch["loss_mask"],
            "pixel_values": batch["pixel_values"] + 1.0,
        }
        assert FORMAT.told(other) == FORMAT.told(batch)


@pytest.mark.parametrize("length", [128, 4096])
def test_positions_take_little_room(length):
    """3 b s integers of a text are nearly all of them one more than the one before."""
    positions = torch.arange(length).expand(3, 2, length)
    batch = {"grids": torch.zeros((0, 3), dtype=torch.int64), "segments": torch.zeros((2, length), dtype=torch.int64)}
    told = FORMAT.told({**batch, "position_ids": positions})
    assert len(json.dumps(told)) < 3 * 2 * length * 4 / 2
