"""Which rows of which tensors lie where: against direct loops, and as exact covers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.huggingface.mapping import Pair
from ldt_schedules.megatron.huggingface.packing import Fused, Gated, Grouped, Packing, Padded, Plain, RowRange, cut
from ldt_schedules.megatron.huggingface.sizes import Sizes

SIZES = Sizes(2, 32, 48, 4, 2, 8, vocab_size=10, padded_vocab_size=16)


def pair_of(packing: Packing, *shapes: tuple[int, ...], sizes: Sizes = SIZES) -> Pair:
    names = tuple(f"hf.{i}" for i in range(len(shapes)))
    return Pair("megatron", names, shapes, packing, sizes)


def pack(pair: Pair, tensors: list[torch.Tensor], shape: tuple[int, ...], rank: int, size: int) -> torch.Tensor:
    """The parameter of one process, in memory."""
    given = dict(zip(pair.names, tensors, strict=True))

    def read(name: str, rows: slice, columns: slice) -> torch.Tensor:
        values = given[name]
        return values[rows] if values.dim() == 1 else values.flatten(1)[rows, columns]

    target = torch.full(shape, -1.0, dtype=tensors[0].dtype)
    pair.part(shape, rank, size).fill(target, read)
    return target


def numbered(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Every element of all tensors another number, none of them 0."""
    starts = itertools.accumulate((torch.Size(shape).numel() for shape in shapes), initial=1)
    return [
        torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
        for start, shape in zip(starts, shapes, strict=False)
    ]


def check_both_ways(pair: Pair, size: int, dim: int | None) -> list[torch.Tensor]:
    """All processes' parts make the tensors again, exactly; gives the parts."""
    tensors = numbered(*pair.shapes)
    shape = list(pair.shape)
    if dim is not None:
        shape[dim] //= size
    parts = [pack(pair, tensors, tuple(shape), rank, size) for rank in range(size)]
    assert all((part != -1).all() for part in parts)
    back = pair.unpack(parts if pair.cut_dim(shape, size) is not None else parts[:1], [torch.float64] * len(tensors))
    assert all(torch.equal(one, other) for one, other in zip(tensors, back, strict=True))
    return parts


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("heads", "groups", "width"),
    [(h, g, d) for h in (1, 2, 4, 6, 8, 12, 28) for g in (1, 2, 4, 6, 12) if h % g == 0 for d in (1, 2, 8)],
)
def test_query_groups_against_a_loop(heads: int, groups: int, width: int, size: int) -> None:
    """Weights and biases. A process may hold a part of a group: megatron-core allows fewer groups than processes."""
    total = (heads + 2 * groups) * width
    sizes = replace(SIZES, num_attention_heads=heads, num_query_groups=groups, head_dim=width)
    for columns in ((), (3,)):
        shapes = [(heads * width, *columns), (groups * width, *columns), (groups * width, *columns)]
        q, k, v = numbered(*shapes)
        expected = []
        for group in range(groups):
            for head in range(heads):
                if head // (heads // groups) == group:
                    expected += [q[head * width + i] for i in range(width)]
            expected += [k[group * width + i] for i in range(width)]
            expected += [v[group * width + i] for i in range(width)]
        pair = pair_of(Grouped("num_query_groups"), *shapes, sizes=sizes)
        assert pair.shape == (total, *columns)
        if total % size == 0:
            parts = check_both_ways(pair, size, 0)
            assert torch.equal(torch.cat(parts), torch.stack(expected))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("heads", [4, 8, 16])
def test_the_fused_matrix_of_the_vision_encoder(heads: int, size: int) -> None:
    width = 3
    sizes = replace(SIZES, num_attention_heads=heads)
    for columns in ((), (5,)):
        shape = (3 * heads * width, *columns)
        (fused,) = numbered(shape)
        each = fused.reshape(3, heads, width, *columns).transpose(0, 1).reshape(shape)
        parts = check_both_ways(pair_of(Fused("num_attention_heads"), shape, sizes=sizes), size, 0)
        assert torch.equal(torch.cat(parts), each)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_process_has_its_gate_and_its_up(size: int) -> None:
    for columns in ((), (5,)):
        gate, up = numbered((8, *columns), (8, *columns))
        parts = check_both_ways(pair_of(Gated(), gate.shape, up.shape), size, 0)
        for part, its_gate, its_up in zip(parts, gate.chunk(size), up.chunk(size), strict=True):
            assert torch.equal(part, torch.cat([its_gate, its_up]))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_padding_is_zero_and_is_not_saved(size: int) -> None:
    parts = check_both_ways(pair_of(Padded("padded_vocab_size"), (10, 3)), size, 0)
    whole = torch.cat(parts)
    assert whole.shape == (16, 3)
    assert (whole[10:] == 0).all() and (whole[:10] != 0).all()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("shape", "dim"), [((8, 4), 0), ((8, 4), 1), ((8, 4), None), ((8,), 0), ((8,), None)])
def test_plain_slices(shape: tuple[int, ...], dim: int | None, size: int) -> None:
    parts = check_both_ways(pair_of(Plain(), shape), size, dim)
    (whole,) = numbered(shape)
    assert torch.equal(parts[-1], whole if dim is None else whole.chunk(size, dim)[-1])


def test_a_convolution_is_a_matrix() -> None:
    pair = pair_of(Plain(), (8, 3, 2, 4, 4))
    assert pair.shape == (8, 96)
    (part,) = check_both_ways(pair, 1, None)
    assert torch.equal(part, numbered((8, 3, 2, 4, 4))[0].flatten(1))


def test_cuts_are_a_partition() -> None:
    whole = [RowRange(0, 3, 8), RowRange(None, 0, 2), RowRange(1, 0, 5)]
    for size in (1, 2, 3, 4, 6, 12):
        rows = [(r.source, i) for rank in range(size) for r in cut(whole, rank, size) for i in range(r.start, r.stop)]
        assert rows == [(r.source, i) for r in whole for i in range(r.start, r.stop)]


def test_fewer_rows_than_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match="the embedding has 9 rows, the Hugging Face directory's 10; give"):
        replace(SIZES, padded_vocab_size=9)
