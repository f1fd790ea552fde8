"""Attention over a sequence that is cut over a context-parallel group, for tests on a CPU.

megatron-core leaves context parallelism to Transformer Engine, which needs a GPU. This stands in for it: every process
gathers the whole sequence and runs megatron-core's own local attention on it, so the sums are those of one process. Each
process holds pieces r and 2 n - 1 - r of 2 n, as megatron-core cuts a batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention


class _Gather(torch.autograd.Function):
    """`[s / n, ...]` of each process -> `[s, ...]`; backward the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        halves = [half for one in parts for half in one.chunk(2)]
        first, second = halves[0::2], halves[1::2]
        return torch.cat([*first, *reversed(second)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=group)
        return own_part(total)


def own_part(whole: torch.Tensor) -> torch.Tensor:
    """This process's two pieces along dimension 0."""
    group = parallel_state.get_context_parallel_group()
    pieces = whole.chunk(2 * group.size())
    return torch.cat([pieces[group.rank()], pieces[-1 - group.rank()]])


class GatheredAttention(DotProductAttention):
    """A core attention of the local layer spec."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        whole = copy.copy(config)
        whole.context_parallel_size = 1
        super().__init__(whole, *args, **kwargs)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        query, key, value = (_Gather.apply(one) for one in (query, key, value))
        return own_part(super().forward(query, key, value, *args, **kwargs))


def use() -> None:
    """Let the local layer spec of this process have it."""
    from megatron.core.models import backends

    backends.LocalSpecProvider.core_attention = lambda self: GatheredAttention
