"""The forward step and loss, written as any Megatron user writes them: ask which stage this is, read, call, reduce."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import broadcast_data
from megatron.core.utils import get_batch_on_this_cp_rank

_INTEGERS = ("tokens", "labels", "position_ids")
_FLOATS = ("loss_mask",)

LossReport = dict[str, torch.Tensor]


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]] | None, model: torch.nn.Module) -> tuple[Any, Any]:
    """Run a stage on the next microbatch.

    Samples of several conversations have `segments`, `[b, s]`, in whose place Megatron knows an attention mask; in the cloud
    they are what the step header tells of a microbatch.

    Returns:
        the stage's output (`[s, b, h]`; at the tail the loss of each token, `[b, s]`) and the loss function.
    """
    if not (parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()):
        told = {} if data_iterator is None else next(data_iterator)
        return model(None, None, told.get("segments")), None
    batch = _batch_on_this_rank(data_iterator)
    segments = batch.get("segments")
    if segments is not None:
        segments = segments.cpu()  # here once, not in each layer: see segment_attention.py
    output = model(batch["tokens"], batch["position_ids"], segments, labels=batch["labels"])
    return output, partial(loss_of_tokens, batch["loss_mask"])


def vision_language_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[Any, Any]:
    """The same for a vision-language model, whose stages read of a microbatch what they need.

    In the cloud the iterator gives what the step header tells of it.
    """
    batch = next(data_iterator)
    return model(batch), partial(loss_of_tokens, batch["loss_mask"]) if "loss_mask" in batch else None


def loss_of_tokens(
    loss_mask: torch.Tensor, token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, LossReport]:
    """Sum of the losses of the tokens that count, how many they are, and both for the log.

    Args:
        loss_mask: `[b, s]`, 1 where a token counts.
        token_losses: `[b, s]`, in nats.
    """
    mask = loss_mask.view(-1)
    losses = token_losses.to(torch.promote_types(token_losses.dtype, torch.float32))  # a sum of 16 bits loses them
    total = torch.sum(losses.view(-1) * mask)
    num_tokens = mask.sum().to(torch.int)
    return total, num_tokens, {"lm loss": torch.stack([total.detach().double(), num_tokens.double()])}


def _batch_on_this_rank(data_iterator: Iterator[dict[str, torch.Tensor]] | None) -> dict[str, torch.Tensor]:
    """The tensor-parallel group's first rank reads, the others get its batch; of that each context-parallel rank takes
    its part of the sequence. A batch with segments all have read: the header, which is written before, tells of them."""
    data = None if data_iterator is None else next(data_iterator)
    everywhere = data is not None and "segments" in data
    if everywhere or parallel_state.get_tensor_model_parallel_world_size() == 1:
        assert data is not None
        batch = dict(data)
    else:
        integers = broadcast_data(list(_INTEGERS), data, torch.int64)
        batch = {**integers, **broadcast_data(list(_FLOATS), data, torch.float32)}
    return get_batch_on_this_cp_rank(batch)  # type: ignore[no-any-return]
