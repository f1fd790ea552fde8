"""Slices of tensor-parallel processes, and the whole tensor that they are of. numpy only.

Megatron cuts a parameter along one dimension. With a stride of 2 it holds two matrices, gate and up of a SwiGLU, and a
process has its part of each:

    whole    | gate 0 | gate 1 | up 0 | up 1 |          slice 0   | gate 0 | up 0 |      slice 1   | gate 1 | up 1 |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Partition:
    """How a parameter is cut over the tensor-parallel processes: along `dim`, as `stride` matrices."""

    dim: int
    stride: int


def join(slices: Sequence[np.ndarray], partition: Partition | None) -> np.ndarray:
    """The whole tensor from its slices, by tensor rank; of a parameter that is not cut the first one is whole."""
    if partition is None or len(slices) == 1:
        return slices[0]
    parts = [np.split(one, partition.stride, axis=partition.dim) for one in slices]
    blocks = [part[block] for block in range(partition.stride) for part in parts]
    return np.concatenate(blocks, axis=partition.dim)


def cut(whole: np.ndarray, partition: Partition, count: int) -> list[np.ndarray]:
    """The slices of `count` tensor-parallel processes, by tensor rank; the inverse of `join`."""
    blocks = np.split(whole, partition.stride * count, axis=partition.dim)
    return [np.concatenate(blocks[rank::count], axis=partition.dim) for rank in range(count)]
