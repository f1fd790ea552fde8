"""The CPU adaptor: what unmodified megatron-core needs to run where there is no GPU.

`patches.cpu.PATCHES` is applied by our own launcher when the process computes on a CPU; a Megatron user does the
same with `patches.apply_all()`.
"""

from __future__ import annotations

from patches.declaring import megatron
from patches.manager import Patch

_REASON = "megatron-core calls it whatever the device"


def _torch(target: str, factory: str, reason: str = _REASON) -> Patch:
    return Patch(
        target=target, factory=f"ldt_schedules.cpu_adaptor:{factory}", reason=reason, package="torch", versions=">=2.6"
    )


_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "linspace", "eye")

PATCHES: tuple[Patch, ...] = (
    _torch("torch.cuda:current_device", "current_device"),
    _torch("torch.cuda:set_device", "nothing"),
    _torch("torch.cuda:synchronize", "nothing"),
    _torch("torch.cuda:empty_cache", "nothing"),
    _torch("torch.cuda:memory_allocated", "zero"),
    _torch("torch.cuda:max_memory_allocated", "zero"),
    _torch("torch.cuda:current_stream", "a_stream"),
    _torch("torch.cuda:default_stream", "a_stream"),
    _torch("torch.cuda:stream", "stream_context"),
    _torch("torch.cuda:get_rng_state", "get_rng_state"),
    _torch("torch.cuda:set_rng_state", "set_rng_state"),
    _torch("torch.cuda:manual_seed", "manual_seed"),
    *(_torch(f"torch:{name}", "factory", 'megatron-core writes device="cuda"') for name in _FACTORIES),
    _torch("torch:Tensor.cuda", "tensor_cuda"),
    _torch("torch:Tensor.to", "tensor_to"),
    _torch("torch:Tensor.type", "tensor_type", "its optimizer compares names of tensor types"),
    _torch("torch.nn:Module.cuda", "tensor_cuda"),
    megatron(
        "core.tensor_parallel.random:_get_cuda_rng_state",
        "cpu_adaptor:get_rng_state",
        "reads the generator list of torch.cuda",
        (("device", "clone", "graph_safe"), ("device",)),
    ),
    megatron(
        "core.tensor_parallel.random:_set_cuda_rng_state",
        "cpu_adaptor:set_rng_state",
        "writes to the generator list of torch.cuda",
        (("new_state", "device", "graph_safe"), ("new_state", "device")),
    ),
    megatron(
        "core.tensor_parallel.random:CudaRNGStatesTracker.fork",
        "cpu_adaptor:fork_without_warning",
        "warns at each dropout that the CPU's random state moved, which is the device's",
        (("self", "name"),),
    ),
)

MEGATRON_LM_PATCHES: tuple[Patch, ...] = (
    _torch("torch.cuda:device_count", "one_device", "megatron.training makes its groups only where there is a device"),
    _torch("torch.cuda:get_device_properties", "no_properties", "megatron.training asks how new the device is"),
    _torch("torch.cuda:Stream", "stream_class", "megatron.training wraps the model on a stream of its own"),
    megatron(
        "core.datasets.utils:compile_helpers",
        "megatron_lm.cpu:compiled_or_made",
        "calls `make` even where the helpers are compiled, as in the wheel, which has no makefile",
        ((),),
    ),
    megatron(
        "core.utils:is_te_min_version",
        "megatron_lm.cpu:no_version_is_no",
        "asked where checkpoints are loaded, and fails where Transformer Engine is not installed",
        (("version", "check_equality"),),
    ),
    megatron("legacy.fused_kernels:load", "megatron_lm.cpu:no_kernels", "asks nvcc for its version", (("args",),)),
)
"""For the training scripts of a Megatron-LM checkout, besides the above."""
