"""MindSpeed-MM's vision-language microbatches through the two laps: the gradients of one process, and what the cloud sees."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch

from ldt_schedules.errors import LdtError
from ldt_schedules.topology import Site
from tests.helpers.workers import site_ports
from tests.mindspeed.vision_laps import (
    IMAGES,
    LANGUAGE_WIDTH,
    MICRO_BATCH,
    VISION_WIDTH,
    VisionCase,
    batches,
    case_of,
    microbatches_of,
    positions_from_tokens,
    train_rank,
    whole,
)
from tests.parity.compare import relative_error

FLOAT32, FLOAT64 = 5e-6, 1e-12


_one_process: dict[VisionCase, dict[str, Any]] = {}


def one_process(workers: Any, case: VisionCase) -> dict[str, Any]:
    """Run once and remembered."""
    if case not in _one_process:
        (_one_process[case],) = workers.run(train_rank, [(case, 0, site_ports())], bare=True)
    return _one_process[case]


def check(workers: Any, case: VisionCase) -> list[dict[str, Any]]:
    """Every gradient, every report and every evaluation of the split model against one process."""
    ports, places = site_ports(), list(case.topology.places())
    ranks = workers.run(train_rank, [(case, place.global_rank, ports) for place in places], bare=True)
    reference = one_process(workers, whole(case))
    tolerance = FLOAT64 if case.double else FLOAT32
    names: set[str] = set()
    for place, rank in zip(places, ranks, strict=True):
        names |= set(rank["gradients"])
        for name, gradient in rank["gradients"].items():
            assert np.abs(gradient).max() > 0, f"{place}: {name} has no gradient"
            error = relative_error(gradient, reference["gradients"][name])
            assert error <= tolerance, f"{place}: the gradient of {name} differs by {error:.2e}"
    assert names == set(reference["gradients"])
    edges = [rank for place, rank in zip(places, ranks, strict=True) if place.site is Site.EDGE]
    for kind in ("reports", "evaluation"):
        assert all(rank[kind] == [] for rank in ranks[len(edges) :])
        mine = list(itertools.chain(*zip(*(edge[kind]["loss"] for edge in edges), strict=True)))
        np.testing.assert_allclose(mine, reference[kind]["loss"], rtol=tolerance)
    return ranks


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(("num_microbatches", "per_token"), [(1, True), (5, False)])
def test_gradients_equal_one_process(workers, num_ranks, num_microbatches, per_token):
    """Texts of three lengths; one image, several, none, a video: each microbatch has shapes of its own in each lap."""
    check(workers, case_of(num_ranks, num_microbatches, per_token=per_token))


def test_what_differs_in_float32_is_rounding(workers):
    check(workers, case_of(3, 4, double=True))


@pytest.mark.parametrize("per_token", [False, True])
def test_two_replicas(workers, per_token):
    """Each replica tells its own cloud process of its own microbatches."""
    check(workers, case_of(2, 3, replicas=2, overlap=True, per_token=per_token))


def test_positions_from_zeros_would_be_seen(workers):
    """Upstream's cloud derives positions from its tokens, which are zeros. The first layer behind them shows it."""
    with pytest.raises(AssertionError, match=r"the gradient of .* differs by [\d.]+e-0[0-3]"):
        check(workers, case_of(2, 1, double=True, from_zeros=True))


def test_a_frozen_vit_sends_no_gradients(workers):
    """Upstream freezes it by default and sends its gradients all the same. Here lap 1 has no backward."""
    ranks = check(workers, case_of(2, 3, frozen=("vit",)))
    backward = {stage for rank in ranks for action in rank["row"] for stage in range(2) if f"_B s{stage} " in action}
    assert backward == set() and any("SEND_B s3 " in action for action in ranks[1]["row"])
    assert not any(name.startswith("vision.decoder") for rank in ranks for name in rank["gradients"])


def test_what_a_cloud_process_sees(workers):
    """Its batches have the shapes of MM's, no pixel and no token; the ViT is told the number of patches by an empty tensor."""
    case = case_of(2, 4)
    (_, cloud) = check(workers, case)
    sent = list(batches(0, range(4), double=False))
    for batch in cloud["seen"]:
        assert set(batch) == {"input_ids", "pixel_values", "image_grid_thw", "attention_mask", "position_ids"}
        assert batch["pixel_values"].size == 0 and not batch["input_ids"].any()
        assert len(batch["pixel_values"]) == batch["image_grid_thw"].prod(1).sum()
    trained = cloud["seen"][: 2 * 4]
    for original in sent:
        found = [b for b in trained if b["input_ids"].shape == original["input_ids"].shape]
        assert any(np.array_equal(b["attention_mask"], original["attention_mask"].numpy()) for b in found)
    assert len({batch["input_ids"].shape for batch in trained}) == 3
    assert len({len(batch["pixel_values"]) for batch in trained}) == len(IMAGES)


@pytest.mark.parametrize("number", range(12))
def test_what_is_told_comes_back_and_betrays_nothing(number):
    """Through JSON, as in a step header; other words and pixels of the same shape tell the same."""
    microbatches = microbatches_of(case_of(2, 1))
    (batch,) = batches(0, range(number, number + 1), double=False)
    told = json.loads(json.dumps(microbatches.told(batch)))
    back = microbatches.in_the_cloud(told)
    grids = next((batch[f"{kind}_grid_thw"] for kind in ("image", "video") if f"{kind}_grid_thw" in batch), None)
    grids = torch.zeros((0, 3), dtype=torch.int64) if grids is None else grids
    torch.testing.assert_close(back["attention_mask"], batch["attention_mask"])
    torch.testing.assert_close(back["image_grid_thw"], grids)
    torch.testing.assert_close(back["position_ids"], positions_from_tokens(batch, grids))
    patches, length = int(grids.prod(1).sum()), batch["input_ids"].shape[1]
    assert [microbatches.shape(told, stage) for stage in range(4)] == [
        *[(patches, 1, VISION_WIDTH)] * 2,
        *[(length, MICRO_BATCH, LANGUAGE_WIDTH)] * 2,
    ]
    other = {**batch, "input_ids": torch.where(batch["input_ids"] < 60, 7, batch["input_ids"])}
    other["labels"] = torch.zeros_like(batch["labels"])
    other |= {name: torch.zeros_like(batch[name]) for name in batch if name.startswith("pixel_values")}
    assert microbatches.told(other) == told


def test_positions_of_the_collator_are_told_as_they_are():
    (batch,) = batches(0, range(1), double=False)
    batch["position_ids"] = torch.arange(3 * batch["input_ids"].numel()).reshape(3, *batch["input_ids"].shape)
    microbatches = microbatches_of(case_of(2, 1), positions=None)
    back = microbatches.in_the_cloud(microbatches.told(batch))
    torch.testing.assert_close(back["position_ids"], batch["position_ids"])
    del batch["attention_mask"]
    assert "attention_mask" not in microbatches.in_the_cloud(microbatches.told(batch))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_features": torch.zeros(1)}, "the batch has input_features; audio has no place"),
        ({"video_grid_thw": torch.ones((1, 3))}, "the batch has images and videos"),
        ({"pixel_values": torch.zeros((3, 24))}, "the batch has 3 rows of pixel values, its grids"),
        ({"pixel_values": None}, "the batch has 0 rows of pixel values"),
        ({"attention_mask": torch.ones((2, 1, 22, 22))}, "attention_mask has the shape (2, 1, 22, 22)"),
        ({"position_ids": torch.ones((2, 22))}, "position_ids have the shape (2, 22), M-RoPE's are (3, 2, 22)"),
    ],
)
def test_batches_that_cannot_be_told_are_refused(changes, message):
    (batch,) = batches(0, range(1), double=False)
    with pytest.raises(LdtError) as error:
        microbatches_of(case_of(2, 1)).told({**batch, **changes})
    assert message in str(error.value)
