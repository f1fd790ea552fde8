"""How rows of Hugging Face tensors lie in Megatron's tensors.

Megatron joins matrices that transformers keeps apart, and orders their rows so that a tensor-parallel process holds what
belongs together. A loader and a saver written separately drift apart. So a packing only *says* which rows lie where, as a
list of `RowRange`; reading, cutting and writing back all follow that list.

    q, k, v, two groups of two heads:   | q0 q1 k0 v0 | q2 q3 k1 v1 |     a process of two holds one group
    gate, up, two processes:            | gate 0 | up 0 |   and   | gate 1 | up 1 |

Sources: megatron/core/transformer/attention.py (`get_query_key_value_tensors`) and mlp.py (`glu`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from ldt_schedules.megatron.huggingface.sizes import Sizes


@dataclass(frozen=True)
class RowRange:
    """Neighbouring rows of one Hugging Face tensor, neighbours in Megatron's as well.

    Attributes:
        source: which of the entry's tensors; None: padding, which is zero and in no Hugging Face tensor.
    """

    source: int | None
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Packing(Protocol):
    """The order of rows in a Megatron tensor."""

    def rows(self, counts: Sequence[int], sizes: Sizes, rank: int, size: int) -> list[RowRange]:
        """The rows that tensor-parallel process `rank` of `size` holds, where they are cut along dim 0.

        Args:
            counts: rows of each Hugging Face tensor.
        """


def cut(whole: Sequence[RowRange], rank: int, size: int) -> list[RowRange]:
    """The rank-th of `size` equal parts."""
    count = sum(map(len, whole)) // size
    first, last = rank * count, (rank + 1) * count
    found, at = [], 0
    for one in whole:
        start, stop = max(first, at), min(last, at + len(one))
        if start < stop:
            found.append(RowRange(one.source, one.start + start - at, one.start + stop - at))
        at += len(one)
    return found


@dataclass(frozen=True)
class Plain:
    """One tensor as it is; of more than two dimensions, all but the first flattened."""

    def rows(self, counts: Sequence[int], sizes: Sizes, rank: int, size: int) -> list[RowRange]:
        return cut([RowRange(0, 0, counts[0])], rank, size)


@dataclass(frozen=True)
class Padded:
    """One tensor, then rows of zeros up to `count`, a size's name."""

    count: str

    def rows(self, counts: Sequence[int], sizes: Sizes, rank: int, size: int) -> list[RowRange]:
        padding = attrgetter(self.count)(sizes) - counts[0]
        return cut([RowRange(0, 0, counts[0]), RowRange(None, 0, padding)], rank, size)


@dataclass(frozen=True)
class Gated:
    """Gate, then up; a process has its part of each."""

    def rows(self, counts: Sequence[int], sizes: Sizes, rank: int, size: int) -> list[RowRange]:
        return [part for source in (0, 1) for part in cut([RowRange(source, 0, counts[source])], rank, size)]


@dataclass(frozen=True)
class Grouped:
    """q, k and v, three tensors: for each query group (`groups`, a size's name) its q heads, its k, its v."""

    groups: str

    def rows(self, counts: Sequence[int], sizes: Sizes, rank: int, size: int) -> list[RowRange]:
        groups = attrgetter(self.groups)(sizes)
        each = [count // groups for count in counts]
        whole = [
            RowRange(source, group * count, (group + 1) * count)
            for group in range(groups)
            for source, count in enumerate(each)
        ]
        return cut(whole, rank, size)


@dataclass(frozen=True)
class Fused:
    """One tensor, all q, all k, all v under each other: for each head (`heads`, a size's name) its q, its k, its v."""

    heads: str

    def rows(self, counts: Sequence[int], sizes: Sizes, rank: int, size: int) -> list[RowRange]:
        third = counts[0] // 3
        parts = Grouped(self.heads).rows([third] * 3, sizes, 0, 1)
        whole = [RowRange(0, third * (p.source or 0) + p.start, third * (p.source or 0) + p.stop) for p in parts]
        return cut(whole, rank, size)
