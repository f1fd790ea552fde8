"""Which parameters of a loaded checkpoint are decayed: a site's optimizer must not take its groups by their position.

Megatron's optimizer has a group of parameters with weight decay (matrices) and one without (biases, norms), in the order in
which a model's first parameter of each comes. A whole model begins with the embedding, so with decay; the middle layers
begin with a norm:

    group of the checkpoint      0  decayed        1  not decayed
    group of the cloud           0  not decayed    1  decayed

megatron-core 0.12 loads the hyperparameters by position, so every later pipeline rank would decay its biases and no matrix.
That is stock behaviour there too, for pipeline ranks after the first. From 0.13 on it loads them by what a group is,
`MegatronOptimizer._filter_and_reorder_param_groups`; the same rule stands here, for 0.12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ldt_schedules.errors import LdtError

IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells one group from another, megatron-core `optimizer._get_param_groups`."""

Groups = list[dict[str, Any]]


def load_groups_by_identity(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `load_state_dict` of Megatron's optimizers."""
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    if hasattr(MegatronOptimizer, "_filter_and_reorder_param_groups"):
        return original

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> Any:
        held = next((state_dict[key] for key in ("optimizer", "optimizer_state_dict") if key in state_dict), state_dict)
        if "param_groups" in held:  # a distributed optimizer may have none
            held["param_groups"] = in_the_order_of(self.optimizer.param_groups, held["param_groups"])
        return original(self, state_dict)

    return load_state_dict


def in_the_order_of(current: Groups, loaded: Groups) -> Groups:
    """The loaded hyperparameters for each of the current groups; `params`, which number those of this process, stay.

    Raises:
        LdtError: a current group is not in the checkpoint, or more are.
    """
    by_identity = {_identity(group): group for group in loaded}
    missing = [_identity(group) for group in current if _identity(group) not in by_identity]
    if missing or len(current) != len(loaded):
        raise LdtError(
            f"the checkpoint's optimizer has the parameter groups {sorted(by_identity)} ({', '.join(IDENTITY)}), this "
            f"model's has {[_identity(group) for group in current]}: load without the optimizer (--no-load-optim)"
        )
    return [
        {**by_identity[_identity(group)], "params": place["params"]}
        for group, place in zip(current, loaded, strict=True)
    ]


def union_of_groups(processes: Iterable[Groups]) -> Groups:
    """The groups of all processes, each kind once: one may hold matrices alone, another norms."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in (group for groups in processes for group in groups):
        found.setdefault(_identity(group), group)
    return list(found.values())


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[name] for name in IDENTITY)
