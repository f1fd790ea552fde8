"""Attention inside segments against a plain masked softmax, exhaustively over small runs."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from ldt_schedules.megatron.segment_attention import SegmentAttention
from ldt_schedules.megatron.segments import run_lengths
from ldt_schedules.megatron.vision_language.attention import FrameAttention, WindowAttention

HEADS, WIDTH = 4, 8


def attention(kind: type = SegmentAttention, *, causal: bool = True, dropout: float = 0.0) -> SegmentAttention:
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=dropout, sequence_parallel=True)
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    made: SegmentAttention = kind(config, 1, mask, "self", cp_comm_type=None, softmax_scale=None, pg_collection=None)
    return made


def tensors(rows: int, samples: int, groups: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn((rows, samples, heads, WIDTH), generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, groups, groups)
    )


def plain(query, key, value, segments, causal):
    """Scores, a mask of s x s, a softmax: `[s, b, heads * d]`."""
    share = HEADS // key.shape[2]
    key, value = key.repeat_interleave(share, 2), value.repeat_interleave(share, 2)
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) / WIDTH**0.5
    seen = segments[:, :, None] == segments[:, None, :]
    if causal:
        seen = seen & torch.ones_like(seen).tril()
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, value).flatten(2)


def check(segments: torch.Tensor, groups: int, causal: bool, given: torch.Tensor | None, kind: type = SegmentAttention):
    samples, rows = segments.shape
    mine, theirs = tensors(rows, samples, groups), tensors(rows, samples, groups)
    found = attention(kind, causal=causal)(*mine, given)
    expected = plain(*theirs, segments, causal)
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found.backward(pull)
    expected.backward(pull)
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def partitions(total: int):
    """All ways to cut `total` rows in runs."""
    for cuts in itertools.product((0, 1), repeat=total - 1):
        yield torch.tensor((0, *cuts)).cumsum(0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_all_pairs_of_samples_with_four_rows(causal, groups):
    for first, second in itertools.product(partitions(4), repeat=2):
        segments = torch.stack([first, second])
        check(segments, groups, causal, segments)


@pytest.mark.parametrize("causal", [True, False])
def test_all_cuts_of_seven_rows(causal):
    for one in partitions(7):
        check(one[None], 2, causal, one[None])


def test_longer_random_segments_whose_numbers_come_again_in_the_next_sample():
    draw = random.Random(2)
    for _ in range(20):
        rows, samples = draw.randint(1, 40), draw.randint(1, 4)
        begins = torch.tensor([[draw.random() < 0.2 for _ in range(rows)] for _ in range(samples)])
        segments = begins.long().cumsum(1)
        check(segments, 2, draw.random() < 0.5, segments)


@pytest.mark.parametrize("causal", [True, False])
def test_without_segments_a_sample_is_one(causal):
    check(torch.zeros((3, 6), dtype=torch.int64), 2, causal, None)


def test_a_vision_layer_takes_its_row():
    windows, frames = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 0, 0, 0, 1])
    both = torch.stack([windows, frames])
    check(windows[None], 4, False, both, WindowAttention)
    check(frames[None], 4, False, both, FrameAttention)


@pytest.mark.parametrize("shape", [(0, 1), (0, 2), (3, 0)])
def test_nothing_to_attend_to(shape):
    query, key, value = tensors(*shape, groups=2)
    found = attention()(query, key, value, torch.zeros(shape[::-1], dtype=torch.int64))
    assert found.shape == (*shape, HEADS * WIDTH)
    found.sum().backward()
    assert query.grad is not None


def test_runs_end_with_their_sample():
    assert run_lengths(torch.tensor([[1, 1, 2], [2, 2, 2]])) == (2, 1, 3)


def test_wider_queries_come_back_in_the_dtype_of_the_values():
    query, key, value = tensors(5, 2, 2)
    found = attention()(query.float(), key.float(), value.bfloat16(), None)
    assert found.dtype is torch.bfloat16


def test_dropout_in_training_only():
    given = tensors(6, 1, 2)
    layer = attention(dropout=0.5)
    layer.eval()
    still = layer(*given, None)
    assert torch.equal(still, attention()(*given, None))
    layer.train()
    torch.manual_seed(1)
    first = layer(*given, None)
    torch.manual_seed(1)
    assert torch.equal(layer(*given, None), first)
    assert not torch.equal(first, still)
