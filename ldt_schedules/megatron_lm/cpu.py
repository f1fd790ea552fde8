"""What Megatron-LM's training scripts need besides the CPU adaptor to run where there is no GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import patches

Function = Callable[..., Any]

_NEEDS_TRITON = "megatron.core.transformer.custom_layers.batch_invariant_kernels"


def prepare_for_cpu() -> None:
    """Apply the CPU adaptor and stand in for what cannot be imported without a GPU.

    The patches of a split model are applied as well: one of them tells Megatron that it may run without a GPU, and
    without a session the others answer as before.
    """
    # Megatron compiles at import, which on a CPU takes longer than a short run and needs a C++ compiler.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if _NEEDS_TRITON not in sys.modules and importlib.util.find_spec("triton") is None:
        sys.modules[_NEEDS_TRITON] = _without_triton()
    patches.apply_for_megatron_lm()


def _without_triton() -> ModuleType:
    """The module of batch-invariant kernels, which are written in Triton: off, and refused when asked for."""

    def enable_batch_invariant_mode() -> None:
        raise RuntimeError("--batch-invariant-mode needs Triton, which is not installed")

    module = ModuleType(_NEEDS_TRITON)
    module.enable_batch_invariant_mode = enable_batch_invariant_mode  # type: ignore[attr-defined]
    module.is_batch_invariant_mode_enabled = lambda: False  # type: ignore[attr-defined]
    return module


def compiled_or_made(original: Function) -> Function:
    """For `compile_helpers`, which calls `make`: the wheel of megatron-core has the helpers compiled and no makefile."""

    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


def no_version_is_no(original: Function) -> Function:
    """For `is_te_min_version`: a Transformer Engine that is not there is of no version."""

    @functools.wraps(original)
    def is_te_min_version(*args: Any, **kwargs: Any) -> bool:
        try:
            return bool(original(*args, **kwargs))
        except (ImportError, TypeError):  # 0.12 imports it, 0.16 compares None
            return False

    return is_te_min_version


def no_kernels(original: Function) -> Function:
    """For the loader of fused CUDA kernels."""
    return lambda *args, **kwargs: None
