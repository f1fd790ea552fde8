"""Stand-ins that let unmodified megatron-core run on a CPU.

megatron-core says `torch.cuda` in many places even where a CPU would do: the current device, a stream, the
random state, `device="cuda"` in a factory call, the tensor type name that gradient clipping asserts. The
patch list `patches/cpu.py` puts these functions there, as vendors' transfer modules do for their devices;
each takes the original and returns its replacement. Nothing of torch.distributed is touched.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

Function = Callable[..., Any]
_CPU = torch.device("cpu")


class CpuStream:
    """A stream of a device that has none: every wait is over at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what a stream of a device takes (device, priority)."""

    def wait_stream(self, stream: object) -> None:
        """Nothing runs ahead on a CPU."""

    def wait_event(self, event: object) -> None:
        """Nothing runs ahead on a CPU."""

    def synchronize(self) -> None:
        """Nothing runs ahead on a CPU."""


def current_device(original: Function) -> Function:
    """`torch.cuda.current_device`: factories take the answer as their device."""
    return lambda: _CPU


def nothing(original: Function) -> Function:
    """For calls that only order work of a device queue (synchronize, empty_cache, set_device)."""
    return lambda *args, **kwargs: None


def zero(original: Function) -> Function:
    """For memory statistics, and anything else that counts what a CPU does not have."""
    return lambda *args, **kwargs: 0


def one_device(original: Function) -> Function:
    """For `torch.cuda.device_count`: with none Megatron makes no parallel groups."""
    return lambda: 1


def no_properties(original: Function) -> Function:
    """For `torch.cuda.get_device_properties`: so new a device that no setting of its queues is demanded."""
    return lambda *args, **kwargs: SimpleNamespace(name="cpu", major=99, minor=0, total_memory=0)


def a_stream(original: Function) -> Function:
    """`torch.cuda.current_stream` and friends."""
    return lambda *args, **kwargs: CpuStream()


def stream_class(original: type) -> type:
    """`torch.cuda.Stream`."""
    return CpuStream


def stream_context(original: Function) -> Function:
    """`torch.cuda.stream(s)`: a context that does nothing."""
    return lambda stream: contextlib.nullcontext()


def get_rng_state(original: Function) -> Function:
    """The device's random state is the CPU generator's."""
    return lambda *args, **kwargs: torch.get_rng_state()


def set_rng_state(original: Function) -> Function:
    """See `get_rng_state`."""
    return lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)


def fork_without_warning(original: Function) -> Function:
    """`CudaRNGStatesTracker.fork` warns where the CPU's random state moves inside: here it is the device's."""
    logging.getLogger(original.__module__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    return original


def manual_seed(original: Function) -> Function:
    """See `get_rng_state`; `torch.manual_seed` itself calls torch.cuda's, hence the generator."""
    return lambda seed: torch.default_generator.manual_seed(seed)


def factory(original: Function) -> Function:
    """`torch.zeros(..., device="cuda")` and its sisters make their tensor on the CPU, in ordinary memory."""

    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return make


def tensor_cuda(original: Function) -> Function:
    """`tensor.cuda()` and `module.cuda()` stay where they are."""
    return lambda self, *args, **kwargs: self


def tensor_to(original: Function) -> Function:
    """`tensor.to("cuda", ...)` keeps the rest of its arguments."""

    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        return original(self, *args, **kwargs)

    return to


def tensor_type(original: Function) -> Function:
    """`tensor.type()` names the CUDA type, which Megatron's optimizer and gradient clipping ask for."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if args or kwargs or not isinstance(answer, str):
            return answer
        return answer.replace("torch.", "torch.cuda.", 1) if answer.count(".") == 1 else answer

    return type_


def _is_cuda(device: object) -> bool:
    return str(device).split(":")[0] == "cuda" if isinstance(device, str | torch.device) else False
