"""Megatron's forward-backward contract, fulfilled by a schedule table.

A training loop asks `get_forward_backward_func()` and calls what it gets with keywords. In a U it gets the function
below; in a process without a session, an edge alone for example, Megatron's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config

from ldt_schedules import device
from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron import session
from ldt_schedules.megatron.chunks import modules_on_rank, shares_parameters
from ldt_schedules.megatron.compatibility import call_with_known
from ldt_schedules.megatron.cross_site import share_num_tokens
from ldt_schedules.megatron.grad_sync import GradSync, per_chunk, scale_to_global_batch
from ldt_schedules.megatron.session import Session
from ldt_schedules.megatron.stages import MegatronStages
from ldt_schedules.megatron.step_announcement import announce, header_of
from ldt_schedules.megatron.two_phases import Phase
from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.dependencies import Value
from ldt_schedules.planning.formats.json_format import as_object
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.batches import SharedBatches
from ldt_schedules.runtime.executor import Executor, check_executable
from ldt_schedules.topology import Site


def select_forward_backward_func(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `get_forward_backward_func`."""

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        if session.current() is None:
            return original(*args, **kwargs)  # type: ignore[no-any-return]
        return forward_backward_pipelining_without_interleaving

    return get_forward_backward_func


def forward_backward_pipelining_without_interleaving(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Iterator[Any] | list[Any] | None,
    model: torch.nn.Module | list[torch.nn.Module],
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
    adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
    p2p_communicator: object | None = None,
    pg_collection: object | None = None,
    force_all_reduce: bool = False,
) -> list[Any]:
    """One step of this process: the keywords and the return value are Megatron's (0.12.1 to 0.16.1).

    Args:
        model: at the edge the module with head and tail, in the cloud the chunk; bare or a list of one. For a U of two
            laps (`ldt_2lap_1f1b`) the list of three chunks that `chunks.modules_on_rank` describes.
        data_iterator: read at the edge only; of a list (one for each chunk) the first.
        seq_length, micro_batch_size: the activations are `[seq_length, micro_batch_size, hidden]`.
        decoder_seq_length, p2p_communicator: unused; peers stand in the table.

    Returns:
        at the edge what the loss function reported, one entry a microbatch; in the cloud an empty list.

    Raises:
        ConfigError: an option that a U cannot honour.
        LdtError: the other site runs another step, or an action failed.
    """
    run = session.current()
    assert run is not None, "no session: get_forward_backward_func would have chosen Megatron's own function"
    chunks = model if isinstance(model, list) else [model]
    config = get_model_config(chunks[0])
    _refuse_unsupported(run, config, adjust_tensor_shapes_fn)
    table = run.table(num_microbatches, forward_only)
    check_executable(table)
    modules = modules_on_rank(chunks, table.layout, run.place.pipeline_rank)
    run.phase = Phase.COMPUTING
    run.link.flight.begin_step(run.steps, partial(as_object, table))
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    grad_sync = GradSync(config, chunks, table.ranks[run.place.pipeline_rank], _reduces_at_end(run, config, chunks[0]))
    if not forward_only:
        grad_sync.close()
        _start_param_sync(config, chunks)
    stages = _announced_stages(
        run,
        config,
        modules,
        table,
        grad_sync,
        data_iterator,
        (seq_length, micro_batch_size),
        forward_step_func=forward_step_func,
        collect_non_loss_data=collect_non_loss_data,
        first_val_step=first_val_step,
    )
    embedding_module = None if forward_only else _clear_deferred_embedding(run, config, stages)
    _execute(stages)
    if not forward_only:
        with run.link.flight.doing("reducing gradients"):
            grad_sync.finish()
            _finish_gradients(run, config, chunks, stages, embedding_module, pg_collection, force_all_reduce)
    run.steps += 1
    if config.timers is not None:
        config.timers("forward-backward").stop()
    return stages.forward_data_store


def _announced_stages(
    run: Session,
    config: Any,
    modules: dict[int, torch.nn.Module],
    table: ScheduleTable,
    grad_sync: GradSync,
    data_iterator: Iterator[Any] | list[Any] | None,
    sizes: tuple[int, int],
    **of_the_loop: Any,
) -> MegatronStages:
    """What computes the step, once both sites know that they are about to run the same one.

    Args:
        sizes: length of a sequence, sequences of a microbatch.
        of_the_loop: what the training loop's call says and the stages alone must know.
    """
    batches = SharedBatches(data_iterator[0] if isinstance(data_iterator, list) else data_iterator)
    stages = MegatronStages(
        run=run,
        config=config,
        modules=modules,
        table=table,
        batches=batches,
        header=announce(run, batches, header_of(run, table, config, *sizes)),
        grad_sync=grad_sync,
        num_tokens=torch.zeros([], dtype=torch.int, device=device.current_device()),
        recompute_window=_recompute_window(config, table.ranks[run.place.pipeline_rank]),
        **of_the_loop,
    )
    run.transport.plan_step(table, lambda message: _whole_spec(message, stages))
    return stages


def _execute(stages: MegatronStages) -> None:
    """Run this rank's row to its end; nothing may be left over."""
    run, table, config = stages.run, stages.table, stages.config
    executor = Executor(
        table=table,
        rank=run.place.pipeline_rank,
        compute=stages,
        transport=run.transport,
        spec=lambda message: _local_spec(_whole_spec(message, stages), run, config),
        flight=run.link.flight,
    )
    run.last_step = executor.run()
    run.link.watch.settle()
    stages.batches.assert_empty()


def _refuse_unsupported(run: Session, config: Any, adjust_tensor_shapes_fn: object) -> None:
    if adjust_tensor_shapes_fn is not None:
        raise ConfigError(
            "adjust_tensor_shapes_fn changes shapes on one rank only; a U takes them from the step header"
        )
    declared = run.topology.size(run.place.site).sequence_parallel
    if config.sequence_parallel != declared:
        raise ConfigError(
            f"the model's sequence_parallel is {config.sequence_parallel}, but the topology says {declared} for the "
            f"{run.place.site}; give both the same"
        )
    for option in ("overlap_moe_expert_parallel_comm", "hybrid_context_parallel", "fine_grained_activation_offloading"):
        if getattr(config, option, False):
            raise ConfigError(f"{option} belongs to Megatron's own schedules and is not supported in a U; turn it off")


def _reduces_at_end(run: Session, config: Any, chunk: torch.nn.Module) -> bool:
    """Megatron: with a grad_sync_func only the first pipeline stage reduces during its last backward."""
    return shares_parameters(chunk) or (config.grad_sync_func is not None and run.place.site is Site.CLOUD)


def _start_param_sync(config: Any, chunks: list[Any]) -> None:
    functions = per_chunk(config.param_sync_func, chunks, "param_sync_func")
    for start, chunk in zip(functions, chunks if functions else [], strict=True):
        start(chunk.parameters())


def _recompute_window(config: Any, row: tuple[Action, ...]) -> dict[int, int] | None:
    """The greatest number of microbatches of each stage that are between their F and their B."""
    if config.num_microbatches_with_partial_activation_checkpoints is None:
        return None
    now: dict[int, int] = {}
    most: dict[int, int] = {}
    for action in row:
        if action.kind is Kind.F:
            now[action.stage] = now.get(action.stage, 0) + 1
            most[action.stage] = max(most.get(action.stage, 0), now[action.stage])
        elif action.kind is Kind.B:
            now[action.stage] -= 1
    return most


def _whole_spec(message: Value, stages: MegatronStages) -> TensorSpec:
    """Shape and dtype of an activation or its gradient, before it is cut over the processes of a pipeline rank."""
    spec, told = stages.header.spec(message.microbatch), stages.header.told
    if told is None:
        return spec
    assert stages.run.microbatch_format is not None
    return TensorSpec(stages.run.microbatch_format.shape(told[message.microbatch], message.stage), spec.dtype)


def _local_spec(whole: TensorSpec, run: Session, config: Any) -> TensorSpec:
    """What this process holds of an activation: context parallelism and sequence parallelism split the sequence."""
    sequence, batch, hidden = whole.shape
    size = run.topology.size(run.place.site)
    sequence //= size.context * (size.tensor if config.sequence_parallel else 1)
    return TensorSpec((sequence, batch, hidden), whole.dtype)


def _clear_deferred_embedding(run: Session, config: Any, stages: MegatronStages) -> Any:
    """Megatron's `defer_embedding_wgrad_compute`: the tail's buffer must be empty before the step."""
    tail = _tail(stages)
    if tail is None or config.finalize_model_grads_func is None:
        return None
    with run.stage(tail):
        return call_with_known(
            schedules.clear_embedding_activation_buffer, config, stages.modules[tail], is_last_stage=True
        )


def _tail(stages: MegatronStages) -> int | None:
    """The stage that computes the loss, if it stands in this process."""
    return next((stage for stage in stages.modules if stages.table.layout.is_tail(stage)), None)


def _finish_gradients(
    run: Session,
    config: Any,
    chunks: list[Any],
    stages: MegatronStages,
    embedding_module: Any,
    pg_collection: object | None,
    force_all_reduce: bool,
) -> None:
    if config.finalize_model_grads_func is None:
        return
    tail = _tail(stages)
    if embedding_module is not None and tail is not None:
        from megatron.core import parallel_state

        with run.stage(tail):
            call_with_known(
                schedules.finish_embedding_wgrad_compute,
                config,
                embedding_module,
                is_last_stage=True,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
            )
    num_tokens = None
    if config.calculate_per_token_loss:
        num_tokens = stages.num_tokens
        share_num_tokens(run, num_tokens)
    # A trainer's wrapper takes any keyword and hands it on to a Megatron that may not know it: only what was asked for.
    optional: dict[str, Any] = {"force_all_reduce": True} if force_all_reduce else {}
    if pg_collection is not None:
        optional["pg_collection"] = pg_collection
    call_with_known(config.finalize_model_grads_func, chunks, num_tokens, **optional)
    scale_to_global_batch(run, config, chunks)
