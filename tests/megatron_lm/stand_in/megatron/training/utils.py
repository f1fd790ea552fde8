"""Small helpers of the loop."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state


def print_rank_last(message: str) -> None:
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        print(message, flush=True)


def calc_params_l2_norm(model: Any, force_create_fp32_copy: bool = False) -> float:
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    mine = [one for one in parameters if first or getattr(one, "tensor_model_parallel", False)]  # others are copies
    squares = [(parameter.float() ** 2).sum() for parameter in mine]
    total = torch.stack([torch.zeros([]), *squares]).sum()
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return float(total) ** 0.5


def get_batch_on_this_tp_rank(data_iterator: Any) -> dict[str, torch.Tensor]:
    """The first process of the tensor-parallel group reads; of a world of pipeline size 1 all get everything."""
    from megatron.training import get_args

    args = get_args()
    assert args.pipeline_model_parallel_size == 1, (
        "a process of a pipeline of one world has no labels at its first stage"
    )
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        batch = next(data_iterator)
    else:
        shape = (args.micro_batch_size, args.seq_length)
        batch = {name: torch.empty(shape, dtype=torch.int64) for name in ("tokens", "labels", "position_ids")}
        batch["loss_mask"] = torch.empty(shape)
    for tensor in batch.values():
        torch.distributed.broadcast(
            tensor,
            parallel_state.get_tensor_model_parallel_src_rank(),
            parallel_state.get_tensor_model_parallel_group(),
        )
    return batch
