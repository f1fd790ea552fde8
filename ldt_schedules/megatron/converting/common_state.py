"""The common state of a converted checkpoint: what is equal in all processes, for stock Megatron or for a site.

    iteration, checkpoint_version, num_floating_point_operations_so_far     as they were
    opt_param_scheduler in samples, as Megatron-LM counts; a site's own, which has a manifest, counts the optimizer's steps
    optimizer           groups of parameters: those of both sites, each kind once; step count; loss scale
    args                megatron_arguments.py
    content_metadata    how the optimizer's state is laid out (megatron-core 0.13 and later ask)

Random states and the place in the data are left out: they fit the processes that saved them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.site_directory import MANIFEST, Manifest
from ldt_schedules.megatron.converting.megatron_arguments import namespace
from ldt_schedules.megatron.converting.plain_values import plain_items
from ldt_schedules.megatron.parameter_groups import union_of_groups

_AS_THEY_WERE = ("iteration", "checkpoint_version", "num_floating_point_operations_so_far")
_SCHEDULER, _OPTIMIZER = "opt_param_scheduler", "optimizer"
_DONE, _LENGTHS = "num_steps", ("lr_warmup_steps", "lr_decay_steps", "wd_incr_steps")
_BATCH = "train.global_batch_size"
_LAYOUT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_OF_DISTRIBUTED = {**_LAYOUT, "distrib_optim_sharding_type": "fully_reshardable"}

State = Mapping[str, Any]


def converted_state(states: Sequence[State], arguments: Mapping[str, Any], *, optimizer: bool) -> dict[str, Any]:
    """From the common states of one checkpoint, or of edge and cloud.

    Args:
        arguments: for `args`, see `megatron_arguments.namespace`.
        optimizer: the optimizer's tensors are in the checkpoint; without them, neither are its groups.
    """
    first = states[0]
    found = {"checkpoint_version": 3.0, **{key: first[key] for key in _AS_THEY_WERE if key in first}}
    optimizers = [state[_OPTIMIZER] for state in states if isinstance(state.get(_OPTIMIZER), dict)]
    optimizer = optimizer and bool(optimizers)
    found["content_metadata"] = _LAYOUT
    if optimizer:
        found[_OPTIMIZER] = _joined(optimizers)
        found[_SCHEDULER] = plain_items(first[_SCHEDULER])
        if "param_state_sharding_type" in optimizers[0]:
            found["content_metadata"] = _OF_DISTRIBUTED
    return {**found, "args": namespace(arguments, optimizer=optimizer)}


def in_samples(state: State, manifest: Manifest | None) -> dict[str, Any]:
    """The same state, with a schedule that counts samples (see Megatron's OptimizerParamScheduler: a step adds the batch size).

    Args:
        manifest: of a checkpoint of our trainer, whose schedule counts the optimizer's steps; None: Megatron-LM's own loop
            has saved it, and it is in samples already.

    Raises:
        ConfigError: the manifest does not say how many samples a step has.
    """
    schedule = state.get(_SCHEDULER)
    if manifest is None or not isinstance(schedule, dict):
        return dict(state)
    batch = manifest.settings.get(_BATCH)
    if not isinstance(batch, int) or batch < 1:
        raise ConfigError(
            f"{MANIFEST} of the {manifest.site} says {_BATCH} {batch!r}, so the schedule of the learning rate cannot be "
            "counted in samples; give --weights-only"
        )
    lengths = {key: schedule[key] * batch for key in _LENGTHS if key in schedule}
    return {**state, _SCHEDULER: {**schedule, **lengths, _DONE: manifest.consumed_samples}}


def same_step(states: Sequence[State]) -> None:
    """Raises ConfigError: the states are of different steps, of the model or of the optimizer."""
    steps = [(state.get("iteration", 0), _steps_done(state)) for state in states]
    iterations = [iteration for iteration, _ in steps]
    counts = {count for _, count in steps if count is not None}
    if len(set(iterations)) > 1:
        raise ConfigError(
            f"the checkpoints are of steps {' and '.join(map(str, iterations))}; give two of the same step"
        )
    if len(counts) > 1:
        raise ConfigError(
            f"the optimizers have done {' and '.join(f'{count:g}' for count in sorted(counts))} steps; give two checkpoints "
            "of the same run"
        )


def _joined(optimizers: Sequence[State]) -> dict[str, Any]:
    """One optimizer's common part, with the groups of all. torch's own state may be a level down (16 bits)."""
    first = dict(plain_items(optimizers[0]))
    groups = union_of_groups(_inner(one)["param_groups"] for one in optimizers)
    inner = {**plain_items(_inner(first)), "param_groups": [plain_items(group) for group in groups]}
    return {**first, _OPTIMIZER: inner} if _OPTIMIZER in first else {**first, **inner}


def _inner(optimizer: State) -> State:
    inner = optimizer.get(_OPTIMIZER, optimizer)
    if not isinstance(inner, dict) or "param_groups" not in inner:
        raise ConfigError("the optimizer of the checkpoint is not one of Megatron's alone; give --weights-only")
    return inner


def _steps_done(state: State) -> float | None:
    optimizer = state.get(_OPTIMIZER)
    inner = optimizer.get(_OPTIMIZER, optimizer) if isinstance(optimizer, dict) else {}
    step = inner.get("state", {}).get("common_step") if isinstance(inner.get("state"), dict) else None
    return None if step is None else float(step)
