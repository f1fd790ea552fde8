"""The world and the parallel groups of one launch."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.training import set_args
from megatron.training.arguments import parse_args, validate_args


def initialize_megatron(
    extra_args_provider: Any = None,
    args_defaults: Any = {},  # noqa: B006 - as the real one
    ignore_unknown_args: bool = False,
    allow_no_cuda: bool = False,
    skip_mpu_initialization: bool = False,
    get_embedding_ranks: Any = None,
    get_position_embedding_ranks: Any = None,
    parsed_args: Any = None,
    store: Any = None,
) -> None:
    if not allow_no_cuda:
        assert torch.cuda.is_available(), "Megatron requires CUDA."
    args = parse_args(extra_args_provider)
    validate_args(args)
    set_args(args)
    torch.distributed.init_process_group(
        "gloo", rank=args.rank, world_size=args.world_size, store=store, timeout=timedelta(minutes=2)
    )
    if torch.cuda.device_count() > 0:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size, args.pipeline_model_parallel_size, context_parallel_size=1
        )
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
