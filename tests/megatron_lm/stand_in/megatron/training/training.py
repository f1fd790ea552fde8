"""The loop: model, optimizer, data, steps, evaluation, in the order of the real one."""

from __future__ import annotations

import sys
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from megatron.training import get_args
from megatron.training.initialize import initialize_megatron
from megatron.training.utils import calc_params_l2_norm, print_rank_last


def pretrain(
    train_valid_test_dataset_provider: Any,
    model_provider: Any,
    model_type: Any,
    forward_step_func: Any,
    process_non_loss_data_func: Any = None,
    extra_args_provider: Any = None,
    args_defaults: Any = {},  # noqa: B006 - as the real one
    get_embedding_ranks: Any = None,
    get_position_embedding_ranks: Any = None,
    non_loss_data_func: Any = None,
    store: Any = None,
    inprocess_call_wrapper: Any = None,
) -> None:
    initialize_megatron(extra_args_provider=extra_args_provider, args_defaults=args_defaults, store=store)
    args = get_args()
    model, optimizer, _ = setup_model_and_optimizer(model_provider, model_type)
    train_iterator, valid_iterator, test_iterator = build_train_valid_test_data_iterators(
        train_valid_test_dataset_provider
    )
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = model[0].no_sync
    config.finalize_model_grads_func = finalize_model_grads
    forward_backward_func = get_forward_backward_func()
    while args.do_train and args.iteration < args.train_iters:
        loss, grad_norm = train_step(forward_step_func, train_iterator, model, optimizer, forward_backward_func)
        args.iteration += 1
        shown = f" | lm loss: {loss:.9E}" if loss is not None else ""
        norm = f" | params norm: {calc_params_l2_norm(model):.7E}" if args.log_params_norm else ""
        print_rank_last(
            f" iteration {args.iteration:8d}/{args.train_iters:8d}{shown} | grad norm: {grad_norm:.7E}{norm} |"
        )
        if args.do_valid and args.iteration % args.eval_interval == 0:
            evaluate(f"iteration {args.iteration}", forward_step_func, valid_iterator, model)
        if args.exit_interval and args.iteration % args.exit_interval == 0:
            sys.exit(0)
    if args.do_test:
        evaluate(f"iteration {args.iteration} on test set", forward_step_func, test_iterator, model)


def get_model(
    model_provider_func: Any,
    model_type: Any = None,
    wrap_with_ddp: bool = True,
    config: Any = None,
    pg_collection: Any = None,
) -> list[Any]:
    model = model_provider_func(
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage()
    )
    model.model_type = model_type
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return [DistributedDataParallel(get_model_config(model), ddp_config, model)]


def setup_model_and_optimizer(
    model_provider_func: Any, model_type: Any, checkpointing_context: Any = None
) -> tuple[list[Any], Any, Any]:
    args = get_args()
    model = get_model(model_provider_func, model_type)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="sgd", lr=args.lr, sgd_momentum=0.0, weight_decay=0.0, clip_grad=1000.0), model
    )
    if args.load is not None:
        with open(f"{args.load}/latest_checkpointed_iteration.txt") as file:
            args.iteration = int(file.read())
    return model, optimizer, None


def build_train_valid_test_data_iterators(build_train_valid_test_datasets_provider: Any) -> tuple[Any, Any, Any]:
    args = get_args()
    iterators = build_train_valid_test_datasets_provider(args)
    args.do_train, args.do_valid, args.do_test = (True, True, True)
    return iterators


def _microbatches() -> int:
    args = get_args()
    return args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)


def _run(
    forward_backward_func: Any, forward_step_func: Any, iterator: Any, model: list[Any], forward_only: bool
) -> Any:
    args = get_args()
    return forward_backward_func(
        forward_step_func=forward_step_func,
        data_iterator=iterator,
        model=model,
        num_microbatches=_microbatches(),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=None,
        forward_only=forward_only,
        **({} if forward_only else {"adjust_tensor_shapes_fn": None, "force_all_reduce": False}),
    )


def _mean(reports: list[dict[str, torch.Tensor]]) -> float | None:
    """Of the losses that this process saw: none but on the last stage."""
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    total = torch.stack([report["lm loss"] for report in reports]).sum(0)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return float(total[0] / total[1])


def train_step(
    forward_step_func: Any, data_iterator: Any, model: list[Any], optimizer: Any, forward_backward_func: Any
) -> tuple[float | None, float]:
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reports = _run(forward_backward_func, forward_step_func, data_iterator, model, forward_only=False)
    _, grad_norm, _ = optimizer.step()
    return _mean(reports), grad_norm


def evaluate(prefix: str, forward_step_func: Any, data_iterator: Any, model: list[Any]) -> None:
    for chunk in model:
        chunk.eval()
    losses = []
    with torch.no_grad():
        for _ in range(get_args().eval_iters):
            losses.append(_mean(_run(get_forward_backward_func(), forward_step_func, data_iterator, model, True)))
    for chunk in model:
        chunk.train()
    shown = [loss for loss in losses if loss is not None]
    if shown:
        print_rank_last(f" validation loss at {prefix} | lm loss value: {sum(shown) / len(shown):.9E} |")
