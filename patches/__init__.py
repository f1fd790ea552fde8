"""Declared patches of Megatron, MindSpeed and torch.cuda; see `patches.manager` for the rules."""

from __future__ import annotations

from ldt_schedules import device
from patches import cpu, manager, megatron_core, megatron_training


def apply_all() -> None:
    """Apply what this process needs: the U's patches of megatron-core and, on a CPU, the CPU adaptor first.

    Raises:
        patches.manager.PatchError: what is installed is not what the patches were written for.
    """
    if device.device_type() == "cpu":
        manager.apply(cpu.PATCHES)
    manager.apply(megatron_core.PATCHES)


def apply_for_megatron_lm() -> None:
    """Apply what a process of Megatron-LM's own training loop needs. Raises as `apply_all` does.

    Without a session, which `ldt launch` makes when the switch is on, every patched function answers as before.
    """
    apply_all()
    if device.device_type() == "cpu":
        manager.apply(cpu.MEGATRON_LM_PATCHES)
    manager.apply(megatron_training.PATCHES)


def revert_all() -> None:
    """Leave everything as it was before `apply_all`."""
    manager.revert()
