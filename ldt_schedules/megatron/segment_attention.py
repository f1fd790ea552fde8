"""Core attention inside segments: rows that may see each other are a run of equal numbers.

A mask says the same with s x s numbers: 10^8 for a picture of 10000 patches, in each layer, and with a mask the fast
kernels are out of reach. But segments are runs. So all runs of one length are gathered into one batched call of
`scaled_dot_product_attention` without a mask, and the results put back:

    segments  0 0 0 1 1 2 2 2       lengths 3 and 2       [2 runs, heads, 3, d] and [1 run, heads, 2, d]

Padding is a segment of its own: it attends to padding, no row attends to nothing, and there is no NaN.

The segments are what Megatron hands through its layers as `attention_mask`: a tensor, so activation recomputation takes
it. Best a CPU tensor: the lengths of the runs are needed by the host, and asking a device for them makes it wait.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention

from ldt_schedules.megatron.segments import run_lengths

Groups = tuple[tuple[int, int], ...]
"""(length of a run, number of such runs), shortest first."""


class SegmentAttention(MegatronModule):
    """In the place of megatron-core's DotProductAttention, with its constructor and `forward`.

    `attention_mask` is not a mask but segment numbers `[b, s]`, in runs; None: each sample is one segment. Causal inside a
    segment, or not, as the layer spec's `attn_mask_type` says.
    """

    row: int | None = None
    """Of several rows of segment numbers `[rows, n]` (then b = 1) the one that counts; a spec names a subclass."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        **process_groups: Any,  # pg_collection, model_comm_pgs: by version; nothing here is asked of a group
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "segments are not cut over context-parallel processes"
        self.causal = attn_mask_type is AttnMaskType.causal
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = (
            softmax_scale  # None: 1 / sqrt(d). Query-key layer scaling would cancel out, as in Megatron
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """`[s, b, heads * d]` from query `[s, b, heads, d]`, key and value `[s, b, groups, d]`; in the dtype of value."""
        assert packed_seq_params is None and attention_bias is None, "segments say it all"
        num_rows, num_samples, heads, width = query.shape
        if num_rows * num_samples == 0:
            return query.to(value.dtype).reshape(num_rows, num_samples, heads * width)
        order, inverse, groups = _grouping(self._runs(attention_mask, query), num_samples, query.device)
        query, key = query.to(value.dtype), key.to(value.dtype)
        parts = zip(*(_gathered(tensor, order, groups) for tensor in (query, key, value)), strict=True)
        attended = [self._attend(*part).transpose(1, 2).reshape(-1, heads * width) for part in parts]
        rows = torch.cat(attended) if len(attended) > 1 else attended[0]
        return (rows if inverse is None else rows.index_select(0, inverse)).view(num_rows, num_samples, heads * width)

    def _runs(self, segments: torch.Tensor | None, query: torch.Tensor) -> tuple[int, ...]:
        """Lengths of the runs, sample after sample."""
        if segments is None:
            return (query.shape[0],) * query.shape[1]
        mine = segments if self.row is None else segments[self.row : self.row + 1]
        assert mine.shape == (query.shape[1], query.shape[0]), f"segments {list(mine.shape)} for {list(query.shape)}"
        return run_lengths(mine)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`[runs, heads, length, d]`; keys and values are repeated for the heads of their group."""
        share = query.shape[1] // key.shape[1]
        if share > 1:
            key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
        dropout = self.dropout if self.training else 0.0
        with self._random(dropout):
            return scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=self.causal, scale=self.softmax_scale
            )

    def _random(self, dropout: float) -> AbstractContextManager[Any]:
        """Heads are split over the tensor-parallel processes: each draws its own, as Megatron's attention does."""
        if dropout and not self.config.sequence_parallel:
            fork: AbstractContextManager[Any] = tensor_parallel.get_cuda_rng_tracker().fork()
            return fork
        return nullcontext()


class AttentionInSegments(DotProductAttention):
    """Megatron's own attention where a microbatch has no segments (`attention_mask` None), and inside them where it has.

    So a process of the cloud need not know before a step which of the two its microbatches are.
    """

    def __init__(self, config: Any, *given: Any, **named: Any) -> None:
        super().__init__(config, *given, **named)
        self.inside = SegmentAttention(config, *given, **named)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *more: Any,
        **named: Any,
    ) -> torch.Tensor:
        """As `SegmentAttention.forward`."""
        attend = super().forward if attention_mask is None else self.inside
        attended: torch.Tensor = attend(query, key, value, attention_mask, *more, **named)
        return attended


@lru_cache(maxsize=32)
def _grouping(
    lengths: tuple[int, ...], num_samples: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None, Groups]:
    """How rows `[s * b]` are gathered, runs of one length together, and put back; None: they stand so already."""
    num_rows = sum(lengths) // num_samples
    length = torch.tensor(lengths)
    start = length.cumsum(0) - length
    tokens, groups = [], []
    for one in sorted(set(lengths)):
        starts = start[length == one]
        tokens.append((starts[:, None] + torch.arange(one)).flatten())
        groups.append((one, len(starts)))
    sample_major = torch.cat(tokens)
    order = (sample_major % num_rows) * num_samples + sample_major // num_rows
    if torch.equal(order, torch.arange(len(order))):
        return None, None, tuple(groups)
    return order.to(device), torch.argsort(order).to(device), tuple(groups)


def _gathered(tensor: torch.Tensor, order: torch.Tensor | None, groups: Groups) -> list[torch.Tensor]:
    """`[s, b, heads, d]` as `[runs, heads, length, d]` for each group."""
    rows = tensor.flatten(0, 1)
    rows = rows if order is None else rows.index_select(0, order)
    sizes = [length * runs for length, runs in groups]
    return [
        part.unflatten(0, (runs, length)).transpose(1, 2)
        for part, (length, runs) in zip(rows.split(sizes), groups, strict=True)
    ]
