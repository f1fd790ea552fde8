"""A small stand-in of what MindSpeed's trainers do, written from their call contract: its own patch manager and train step.

It does what the contract says, the traps included: a function is told from a wrapper by its name, wrappers stack, a name
that does not exist is made, a by-name import is found by the attribute's own name only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

WRAPPER_SUFFIXES = ("wrapper", "decorator")


def is_wrapper(function: Any) -> bool:
    """A partial or a callable object has no name, so it always replaces."""
    return getattr(function, "__name__", "").endswith(WRAPPER_SUFFIXES)


@dataclass
class Info:
    """What is registered for one path, and what stood there at first."""

    path: str
    patch_func: Any = None
    wrappers: list[Any] = field(default_factory=list)
    orig_func: Any = None
    found: bool = False
    is_applied: bool = False

    def owner(self) -> tuple[Any, str]:
        head, _, name = self.path.rpartition(".")
        try:
            return importlib.import_module(head), name
        except ModuleNotFoundError:
            module, _, class_name = head.rpartition(".")
            owner = getattr(importlib.import_module(module), class_name)
            if not hasattr(owner, name):
                raise RuntimeError(f"{owner} has no method {name}") from None
            return owner, name

    def apply(self) -> None:
        if self.is_applied:
            return
        owner, name = self.owner()
        current = getattr(owner, name, None)  # silently None, and set below
        if not self.found:
            self.orig_func, self.found = current, True
        final = self.orig_func if self.patch_func is None else self.patch_func
        for wrapper in self.wrappers:
            final = wrapper(final)
        setattr(owner, name, final)
        for module in list(sys.modules.values()):
            if getattr(module, name, owner) is current:
                setattr(module, name, final)
        self.is_applied = True


class PatchManager:
    """`register_patch` records, `apply_patches` acts."""

    def __init__(self) -> None:
        self.patches_info: dict[str, Info] = {}

    def register_patch(self, path: str, new_func: Any = None, force_patch: bool = False) -> None:
        info = self.patches_info.setdefault(path, Info(path))
        if is_wrapper(new_func):
            if new_func not in info.wrappers:
                info.wrappers.append(new_func)
        elif info.patch_func is not None and not force_patch:
            raise RuntimeError(f"{path} is replaced already")
        else:
            info.patch_func = new_func
        info.is_applied = False

    def remove_wrappers(self, path: str, names: str | list[str] | None, remove_check: bool = True) -> None:
        info = self.patches_info[path]
        gone = [names] if isinstance(names, str) else names
        kept = [w for w in info.wrappers if gone is not None and w.__name__ not in gone]
        if remove_check and len(kept) == len(info.wrappers):
            raise RuntimeError("removed nothing")
        info.wrappers[:] = kept

    def apply_patches(self) -> None:
        for info in self.patches_info.values():
            info.apply()


class ConfigPatches:
    """MM's list of patches by key of the model json, on top of a patch manager that always overwrites."""

    def __init__(self, manager: PatchManager, theirs: list[tuple[str, Any]]) -> None:
        self.manager = manager
        self.configs = {"layerwise_disaggregated_training": theirs, "another_key": []}

    def apply_patches_from_config(self, keys: dict[str, bool]) -> None:
        for key, wanted in keys.items():
            for path, function in self.configs.get(key, []) if wanted else []:
                self.manager.register_patch(path, function, force_patch=True)
        self.manager.apply_patches()


def train_step(
    args: SimpleNamespace, forward_step_func: Callable[..., Any], iterators: list[Any], model: list[Any]
) -> Any:
    """Gradients to zero, the schedule called by keywords, and the reports read on the first stage: dicts, averaged."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in model:
        chunk.zero_grad_buffer()
    losses_reduced = get_forward_backward_func()(
        forward_step_func=forward_step_func,
        data_iterator=iterators,
        model=model,
        num_microbatches=args.num_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=None,
        forward_only=args.forward_only,
    )
    if not parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        return losses_reduced
    assert len(losses_reduced) == args.num_microbatches, "the first stage reads one dict for each microbatch"
    return {key: [report[key] for report in losses_reduced] for key in losses_reduced[0]}
