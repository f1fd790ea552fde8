"""What a process keeps in a checkpoint: its part of the model, of the optimizer, the learning-rate schedule, random states.

The structure and every key are those of Megatron-LM's own checkpoints (megatron/training/checkpointing.py,
`generate_state_dict`), so that its tools know them. Around Megatron's optimizers four things need care:

    torch's Adam has no state before its first step, and Megatron's optimizers ask for it when a checkpoint is to be loaded;
    plain SGD has none at all, which they do not expect;
    a distributed optimizer of torch's Adam cannot load what it saved, and gives all parameters *one* step counter, which
    Adam would then advance once for each parameter in every step;
    hyperparameters are saved by the site's first process, which may hold no biases, or no matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factory_merges,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.random_states import random_states, set_random_states
from ldt_schedules.megatron.checkpoints.strategies import fill, find, gathered, kinds_of, shards_of, unasked
from ldt_schedules.megatron.checkpoints.torch_dist import TorchDistCheckpoint
from ldt_schedules.megatron.chunks import bare_module
from ldt_schedules.megatron.compatibility import call_with_known
from ldt_schedules.megatron.parameter_groups import union_of_groups

RNG = "rng_state"
_MAX_LISTED = 20


@dataclass(frozen=True)
class Trainee:
    """What is kept. Without optimizer and schedule: weights alone."""

    model: torch.nn.Module
    optimizer: Any = None
    scheduler: Any = None

    @property
    def inner_optimizer(self) -> Any:
        """Megatron's optimizer inside its chain of one; None where nothing is trained here."""
        if self.optimizer is None:
            return None
        (inner,) = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return None if getattr(inner, "is_stub_optimizer", False) else inner


def check_savable(distributed_optimizer: bool, optimizer: str) -> None:
    """Before training. Raises ConfigError: this optimizer's state cannot be saved."""
    if not distributed_optimizer:
        return
    advice = "set train.distributed_optimizer=false or train.save_interval=0"
    if not hasattr(DistributedOptimizer, "sharded_param_state_fully_reshardable"):
        raise ConfigError(
            "this megatron-core saves a distributed optimizer's state by its place in a buffer, which one site cannot read "
            f"again; use megatron-core 0.15 or later, or {advice}"
        )
    if optimizer != "adam":
        raise ConfigError(f"a distributed optimizer of {optimizer} has no state that megatron-core can save; {advice}")


def state_to_save(trainee: Trainee, iteration: int) -> dict[str, Any]:
    """For `dist_checkpointing.save`. A collective of the site."""
    state = _sharded(trainee, loading=False)
    if trainee.scheduler is not None:
        state["opt_param_scheduler"] = trainee.scheduler.state_dict()
    if trainee.optimizer is not None:
        _share_common_part(state)
    state[RNG] = _of_this_process(random_states())
    return {**state, "iteration": iteration, "checkpoint_version": 3.0}


def load_state(
    trainee: Trainee,
    checkpoint: TorchDistCheckpoint,
    num_layers: Mapping[str, int] | None = None,
    schedule_steps: int | None = None,
) -> None:
    """Fill a process's part in place. A collective of the site: what one process misses, all refuse.

    Learning rates, weight decay and the like are the optimizer's own: a run's config says them, not what was saved.

    Args:
        num_layers: the beginning of layers' keys -> how many the model has; then layers that it has not are refused.
        schedule_steps: how far the learning-rate schedule is; None: as the checkpoint says. (Megatron-LM counts samples.)

    Raises:
        ConfigError: tensors are missing, too many or of another shape (listed, before anything is changed), or a file that no
            digest covers is found damaged while it is read.
    """
    common = checkpoint.common
    state = _sharded(trainee, loading=True)
    factories, _ = extract_matching_values(state, _is_factory, return_lists_as_dicts=True)
    wanted, problems = find(shards_of(state), checkpoint)
    inner = trainee.inner_optimizer
    if inner is not None and not {"optimizer", "opt_param_scheduler"} <= common.keys():
        problems = ["the optimizer's state: it holds weights alone; set train.finetune=true to start from them"]
    if num_layers is not None:
        kinds = {kind for everybody in gathered(kinds_of(wanted)) for kind in everybody}
        problems += unasked(kinds, checkpoint, num_layers)
    _refuse(checkpoint, problems)
    with checkpoint.reading() as reader:
        fill(wanted, reader)
    if isinstance(inner, DistributedOptimizer):
        _take_slices(inner, state["optimizer"], factories.get("optimizer", {}))
    if inner is not None:
        _finish_optimizer(inner, common["optimizer"])
    if trainee.scheduler is not None and "opt_param_scheduler" in common:
        steps = {} if schedule_steps is None else {"num_steps": schedule_steps}
        trainee.scheduler.load_state_dict({**common["opt_param_scheduler"], **steps})


def _share_common_part(state: dict[str, Any]) -> None:
    """Put what all processes know of the optimizer into the state of each. A collective of the site.

    Megatron keeps the first process's alone, which may hold no norm, no matrix, or nothing that learns.
    """
    found = [common for common in gathered(_common_part(state.get("optimizer"))) if common is not None]
    if not found:
        return
    groups = union_of_groups(map(_groups, found))
    step = next((one for common in found if (one := _step(common)) is not None), None)
    optimizer = state.setdefault("optimizer", found[0])
    _groups(optimizer)[:] = groups
    inside = optimizer.get("optimizer", optimizer)
    if step is not None and "state" in inside:
        inside["state"]["common_step"] = torch.tensor(step)


def _common_part(optimizer_state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of a sharded state dict of any of Megatron's optimizers, without what is cut over processes."""
    if optimizer_state is None:
        return None
    inside = optimizer_state.get("optimizer", optimizer_state)
    kept: dict[str, Any] = {"param_groups": [_without_parameters(group) for group in inside["param_groups"]]}
    if "state" in inside:
        kept["state"] = {key: value for key, value in inside["state"].items() if key == "common_step"}
    if inside is optimizer_state:
        return kept
    scaler = {key: optimizer_state[key] for key in ("grad_scaler",) if key in optimizer_state}
    return {"optimizer": kept, **scaler}


def load_random_states(checkpoint: TorchDistCheckpoint) -> bool:
    """Those of this process, from a checkpoint of a world of the same sizes; False where they are of another device.

    Raises:
        ConfigError: they are not there.
    """
    key = _of_this_process(None).unique_key
    if key not in checkpoint.objects:
        raise ConfigError(f"{checkpoint.path} has no {key}, the random states of this process")
    with checkpoint.reading() as reader:
        return set_random_states(reader.object(key))


def _of_this_process(value: Any) -> ShardedObject:
    return ShardedObject(RNG, value, (dist.get_world_size(),), (dist.get_rank(),))


def _refuse(checkpoint: TorchDistCheckpoint, mine: list[str]) -> None:
    problems = sorted({one for everybody in gathered(mine) for one in everybody})
    if problems:
        listed = [f"  {one}" for one in problems[:_MAX_LISTED]]
        if len(problems) > _MAX_LISTED:
            listed.append(f"  and {len(problems) - _MAX_LISTED} more")
        raise ConfigError(
            f"{checkpoint.path} does not fit the model ({len(problems)} tensors); nothing was loaded:\n"
            + "\n".join(listed)
        )


def _sharded(trainee: Trainee, loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    module, inner = bare_module(trainee.model), trainee.inner_optimizer
    state: dict[str, Any] = {"model": module.sharded_state_dict(metadata=metadata)}
    if inner is not None:
        _initialize(inner)
        # Of the others `is_loading` would only initialise, and fail where there is nothing to (SGD).
        loading = loading and isinstance(inner, DistributedOptimizer)
        state["optimizer"] = call_with_known(inner.sharded_state_dict, state, is_loading=loading, metadata=metadata)
    return state


def _initialize(inner: Any) -> None:
    """Give Adam the state that it has after its first step, with a count of 0; it computes the same from it as from none."""
    adam = isinstance(inner.optimizer, torch.optim.Adam)
    if inner.init_state_fn is None:  # SGD
        return
    for parameter in (one for group in inner.optimizer.param_groups for one in group["params"]):
        state = inner.optimizer.state[parameter]
        if not state:
            state.update(exp_avg=torch.zeros_like(parameter.data), exp_avg_sq=torch.zeros_like(parameter.data))
            if adam:
                state["step"] = torch.tensor(0.0)


def _finish_optimizer(inner: Any, common: dict[str, Any]) -> None:
    """After the tensors: step count and loss scale."""
    _set_step(inner.optimizer, _step(common))
    if getattr(inner, "grad_scaler", None) is not None and "grad_scaler" in common:
        inner.grad_scaler.load_state_dict(common["grad_scaler"])


def _take_slices(inner: DistributedOptimizer, state: dict[str, Any], factories: Any) -> None:
    """A distributed optimizer's tensors were read as whole parameters; it takes its own slices of them.

    Its own `load_state_dict` would do so, and fail: it looks for torch's step counter among the tensors.
    """
    dict_list_map_inplace(lambda one: one.data if isinstance(one, ShardedTensor) else one, state)
    whole = apply_factory_merges(state, factories)
    for parameter_state in inner.optimizer.state.values():
        parameter_state.pop("step", None)
    inner.load_parameter_state_from_fully_reshardable(whole["param_state"])
    for parameter_state in inner.optimizer.state.values():
        parameter_state["step"] = torch.tensor(0.0)


def _set_step(optimizer: Any, step: float | None) -> None:
    """A counter for each parameter (torch), or one for each group (Apex, Transformer Engine)."""
    if step is None:
        return
    for group in optimizer.param_groups:
        counted = [optimizer.state[parameter] for parameter in group["params"] if "step" in optimizer.state[parameter]]
        for state in counted:
            state["step"] = torch.tensor(float(step))
        if not counted and group["params"]:
            group["step"] = int(step)


def _groups(optimizer_state: dict[str, Any]) -> list[dict[str, Any]]:
    """Of any of Megatron's optimizers: two of three put torch's state one level down."""
    groups: list[dict[str, Any]] = optimizer_state.get("optimizer", optimizer_state)["param_groups"]
    return groups


def _step(common: dict[str, Any]) -> float | None:
    """Steps that the optimizer has done; None of one that does not count."""
    inside = common.get("optimizer", common)
    step = inside.get("state", {}).get("common_step")
    if step is None:
        step = next((group["step"] for group in inside["param_groups"] if group.get("step") is not None), None)
    return None if step is None else float(step)


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _is_factory(one: Any) -> bool:
    return isinstance(one, ShardedTensorFactory)
