"""What the cloud is told of packed samples, and attention that is Megatron's own where nothing is told."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from ldt_schedules.megatron.segments import SegmentedMicrobatches, numbered, places, runs, segment_lengths
from ldt_schedules.runtime.step_header import StepHeader
from tests.parity import chat

FORMAT = SegmentedMicrobatches(width=32)


def test_lengths_and_places_of_segments() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 1]])
    assert segment_lengths(segments) == [[3, 2, 2], [6, 1]]
    assert places(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 0]]
    again = numbered(segment_lengths(segments))
    assert segment_lengths(again) == segment_lengths(segments) and runs(again)[0] == [[0, 3], [1, 2], [2, 2]]


def test_one_segment_goes_on_in_no_other_sample() -> None:
    assert places(torch.ones((2, 3), dtype=torch.int64)).tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("batches", [chat.packed, chat.packed_left])
def test_the_header_has_lengths_and_nothing_else(batches) -> None:
    """Canaries in place of every token, label and mask: they are not in it, and without them it is the same."""
    for batch in batches(0, range(chat.MICROBATCHES)):
        canary = {
            name: torch.full_like(batch[name], 424242) for name in ("tokens", "labels", "loss_mask", "position_ids")
        }
        told = FORMAT.told(batch)
        assert FORMAT.told({**batch, **canary, "segments": batch["segments"] * 3 + 424242}) == told
        assert told == {"segments": segment_lengths(batch["segments"])}
        header = StepHeader(0, False, "hash", ((12, 2, 32),), "float32", told=(told,))
        text = json.dumps(header.to_message())
        assert "424242" not in text and asdict(StepHeader.from_message(json.loads(text)))["told"] == (told,)


def test_the_cloud_sees_the_same_borders() -> None:
    for batch in chat.packed(0, range(chat.MICROBATCHES)):
        told = json.loads(json.dumps(FORMAT.told(batch)))
        cloud = FORMAT.in_the_cloud(told)
        assert cloud.keys() == {"segments"}
        for mine, theirs in zip(cloud["segments"], batch["segments"], strict=True):
            assert torch.equal(mine[:, None] == mine, theirs[:, None] == theirs)
        assert FORMAT.shape(told, stage=1) == (12, 2, 32)
