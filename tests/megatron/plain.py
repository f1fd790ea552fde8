"""Plain Megatron, as anybody runs it: stock megatron-core on a CPU, none of our patches, its own checkpoints.

    reference = save_plain(workers, path, tensor=2, pipeline=2, steps=2, more=2)    4 steps; after 2 a checkpoint is saved
    continued = continue_plain(workers, path, steps=2)                              the last 2 again, from the checkpoint

A step directory is written in the structure of Megatron-LM's `save_checkpoint`, by megatron-core's own strategies, with
layers stacked under one key. `Result` has the loss of each step and the whole model's weights by name.
"""

from __future__ import annotations

import argparse
import multiprocessing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldt_schedules.comm.ports import free_ports
from ldt_schedules.topology import SiteSize, Topology
from tests.helpers.workers import Workers
from tests.parity.case import SEQUENCE, Case, batches

CASE = Case(
    layers=(1, 2, 2, 1),
    num_microbatches=4,
    optimizer="adam",
    model=(("activation", "swiglu"), ("num_query_groups", 2)),
)
"""Six layers, gated, fewer key heads than heads: what Megatron packs and cuts in ways of its own is in it."""


@dataclass(frozen=True)
class Result:
    """Of a run: the mean loss of each step; whole weights by their name in the whole model, at the end and when saved."""

    losses: list[float]
    weights: dict[str, np.ndarray]
    saved: dict[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """What the processes of a plain world do: load, train, save, train on.

    Attributes:
        first: the first step's number, which says what its data are.
        finetune: load the weights alone.
    """

    case: Case
    tensor: int = 1
    pipeline: int = 1
    first: int = 0
    steps: int = 2
    more: int = 0
    load: str | None = None
    save: str | None = None
    finetune: bool = False


def save_plain(
    workers: Workers,
    path: Path,
    case: Case = CASE,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    steps: int = 2,
    more: int = 0,
) -> Result:
    """Train `steps` from scratch, save the step directory `path`, train `more`."""
    return run(workers, Run(case, tensor, pipeline, steps=steps, more=more, save=str(path)))


def continue_plain(
    workers: Workers,
    path: Path,
    case: Case = CASE,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    first: int = 2,
    steps: int = 2,
    finetune: bool = False,
) -> Result:
    """Load the step directory `path` as stock Megatron does, strictly, and train `steps`."""
    return run(workers, Run(case, tensor, pipeline, first=first, steps=steps, load=str(path), finetune=finetune))


def run(workers: Workers, one: Run) -> Result:
    """In `tensor * pipeline` processes."""
    size, (port,) = one.tensor * one.pipeline, free_ports(1)
    ranks: list[Result] = workers.run(_rank, [(one, rank, port) for rank in range(size)], timeout_s=110, bare=True)
    return Result(
        ranks[-1].losses,
        {name: value for rank in ranks for name, value in rank.weights.items()},
        {name: value for rank in ranks for name, value in rank.saved.items()},
    )


def _rank(one: Run, rank: int, port: int) -> Result:
    """One process. Its losses are empty unless it is on the last pipeline stage."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from patches import cpu, manager

    warnings.simplefilter("ignore")
    manager.apply(cpu.PATCHES)
    size = one.tensor * one.pipeline
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(one.tensor, one.pipeline)
    model_parallel_cuda_manual_seed(1)
    trained = _built(one)
    if one.load is not None:
        _load(one, trained)
    losses = [_step(one.case, trained, number) for number in range(one.first, one.first + one.steps)]
    saved: dict[str, np.ndarray] = {}
    if one.save is not None:
        _save(one, trained)
        saved = dict(_whole_weights(trained.gpt))
    losses += [_step(one.case, trained, one.first + one.steps + number) for number in range(one.more)]
    weights = dict(_whole_weights(trained.gpt))
    torch.distributed.destroy_process_group()
    return Result([loss for loss in losses if loss is not None], weights, saved)


@dataclass
class _Trained:
    """`gpt` is what the wrappers of `model` hold."""

    gpt: Any
    model: Any
    optimizer: Any
    scheduler: Any


def _built(one: Run) -> _Trained:
    """Stock GPTModel, DistributedDataParallel and optimizer; sizes and first weights of the case's split runs."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from ldt_schedules.megatron.initialization import initialize_by_name
    from ldt_schedules.megatron.layer_span import LayerSpan, building
    from ldt_schedules.topology import Site
    from ldt_schedules.training.model import _optimizer_config, _scheduler, transformer_config

    config = one.case.config()
    # The cloud of such a U has the sizes of this world.
    topology = Topology(one.pipeline + 1, cloud=SiteSize(tensor=one.tensor))
    whole = transformer_config(config, topology, Site.CLOUD)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    gpt = GPTModel(
        config=whole,
        transformer_layer_spec=get_gpt_layer_local_spec(
            normalization=config.model.normalization, qk_layernorm=config.model.qk_norm
        ),
        vocab_size=one.case.vocabulary().rows,
        max_sequence_length=SEQUENCE,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type=config.model.position_embedding,
        rotary_base=config.model.rope_theta,
    )
    held = len(gpt.decoder.layers)
    with building(LayerSpan(gpt.decoder.layers[0].layer_number - 1, held)):
        initialize_by_name(gpt, whole, config.train.seed)
    if config.model.tie_embeddings and one.pipeline > 1 and (first or last):
        # The last stage's copy was drawn under a name of its own.
        group = parallel_state.get_embedding_group()
        weight = gpt.shared_embedding_or_output_weight().data
        torch.distributed.broadcast(weight, torch.distributed.get_global_rank(group, 0), group)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = gpt if config.model.precision == "fp32" else Float16Module(whole, gpt)
    ddp = DistributedDataParallel(config=whole, ddp_config=ddp_config, module=wrapped)
    optimizer = get_megatron_optimizer(_optimizer_config(config, ddp_config), [ddp])
    whole.finalize_model_grads_func, whole.no_sync_func = finalize_model_grads, ddp.no_sync
    whole.grad_scale_func = optimizer.scale_loss
    scheduler = _scheduler(config, optimizer)
    for name in ("lr_warmup_steps", "lr_decay_steps", "wd_incr_steps"):  # Megatron-LM's counts samples
        setattr(scheduler, name, getattr(scheduler, name) * config.train.global_batch_size)
    return _Trained(gpt, ddp, optimizer, scheduler)


def _step(case: Case, trained: _Trained, number: int) -> float | None:
    """An optimizer step; its mean loss on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from ldt_schedules.training.forward_step import forward_step

    trained.model.zero_grad_buffer()
    trained.optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches(number, range(case.num_microbatches)),
        model=[trained.model],
        num_microbatches=case.num_microbatches,
        seq_length=SEQUENCE,
        micro_batch_size=2,
        decoder_seq_length=SEQUENCE,
        forward_only=False,
    )
    assert trained.optimizer.step()[0]
    trained.scheduler.step(case.config().train.global_batch_size)
    losses = [report["lm loss"][0] / report["lm loss"][1] for report in reports]
    return float(sum(losses) / len(losses)) if losses else None


def _metadata() -> dict[str, Any]:
    return {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def _state(trained: _Trained, *, loading: bool, optimizer: bool = True) -> dict[str, Any]:
    """As Megatron-LM's `generate_state_dict`."""
    from megatron.core import parallel_state

    metadata = {**_metadata(), "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {
        "checkpoint_version": 3.0,
        "model": trained.gpt.sharded_state_dict(metadata=metadata),
    }
    if optimizer:
        state["optimizer"] = trained.optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
        state["opt_param_scheduler"] = trained.scheduler.state_dict()
    return state


def _save(one: Run, trained: _Trained) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    assert one.save is not None
    if torch.distributed.get_rank() == 0:
        Path(one.save).mkdir(parents=True)
    torch.distributed.barrier()
    place = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    state = {
        **_state(trained, loading=False),
        "args": megatron_arguments(one),
        "iteration": one.first + one.steps,
        "rng_state": ShardedObject("rng_state", [{"torch": torch.get_rng_state()}], (one.pipeline, one.tensor), place),
    }
    with _children_allowed():
        dist_checkpointing.save(state, one.save, content_metadata=_metadata())


@contextmanager
def _children_allowed() -> Iterator[None]:
    """megatron-core writes from processes that it starts; ours may start none, lest they outlive a test."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    settings["daemon"] = False
    try:
        yield
    finally:
        filesystem_async._results_queue = None  # and with it the manager's process
        settings["daemon"] = True


def megatron_arguments(one: Run) -> argparse.Namespace:
    """Some of what Megatron-LM saves of its command line."""
    model = one.case.config().model
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        max_position_embeddings=SEQUENCE,
        tensor_model_parallel_size=one.tensor,
        pipeline_model_parallel_size=one.pipeline,
        consumed_train_samples=2 * one.case.num_microbatches * (one.first + one.steps),
        data_path=["/private/corpus"],
    )


def _load(one: Run, trained: _Trained) -> None:
    """Stock and strict: what is missing in the checkpoint fails, in tensors, objects and the model's own loading."""
    from megatron.core import dist_checkpointing

    assert one.load is not None
    state = _state(trained, loading=True, optimizer=not one.finetune)
    # megatron-core's words: what the checkpoint has besides is missing (here), what it lacks is unexpected.
    loaded, besides, lacking = dist_checkpointing.load(state, one.load, strict="return_all")
    assert not lacking, lacking
    assert not {key for key in besides if "core_attention" not in key and not key.startswith("optimizer.")}, besides
    trained.gpt.load_state_dict(loaded["model"], strict=True)
    if not one.finetune:
        trained.optimizer.load_state_dict(loaded["optimizer"])
        trained.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    else:
        trained.optimizer.reload_model_params()


def _whole_weights(gpt: Any) -> Any:
    """Put together over the tensor-parallel group; a collective of it."""
    from megatron.core import parallel_state

    from ldt_schedules.megatron.chunks import global_parameters
    from ldt_schedules.megatron.layer_span import LayerSpan, building

    group = parallel_state.get_tensor_model_parallel_group()
    with building(LayerSpan(gpt.decoder.layers[0].layer_number - 1, len(gpt.decoder.layers))):
        named = list(global_parameters(gpt))
    if gpt.share_embeddings_and_output_weights:
        named = [(name, parameter) for name, parameter in named if name != "output_layer.weight"]
    for name, parameter in named:
        parts = [parameter.detach()]
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            parts = [torch.empty_like(parameter) for _ in range(group.size())]
            torch.distributed.all_gather(parts, parameter.detach().contiguous(), group=group)
        if not getattr(parameter, "tensor_model_parallel", False):
            whole = parts[0]
        elif name.endswith("linear_fc1.weight") and gpt.config.gated_linear_unit:
            halves = [part.chunk(2) for part in parts]  # each process has its part of the gate, then of the other
            whole = torch.cat([half[side] for side in (0, 1) for half in halves])
        else:
            whole = torch.cat(parts, dim=parameter.partition_dim)
        yield name, whole.float().numpy().copy()  # numpy has no bfloat16
