"""The one place that knows which accelerator this process computes on: cuda, npu or cpu.

Everything else asks here, so that no other file says `torch.cuda` or `torch.npu`. On a CPU the stream and
event verbs do nothing, and the code above them needs no branch.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

_COLLECTIVE_BACKEND = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}


@lru_cache(maxsize=1)
def device_type() -> str:
    """`"cuda"`, `"npu"` or `"cpu"`; the environment variable LDT_DEVICE overrides what is found."""
    asked = os.environ.get("LDT_DEVICE")
    if asked is not None:
        if asked not in _COLLECTIVE_BACKEND:
            raise ValueError(f"LDT_DEVICE={asked!r} is not one of {sorted(_COLLECTIVE_BACKEND)}")
        return asked
    # torch.version.cuda and not torch.cuda.is_available(): the CPU adaptor answers for the latter.
    if torch.version.cuda is not None and torch._C._cuda_getDeviceCount() > 0:
        return "cuda"
    if hasattr(torch, "npu") and torch.npu.is_available():
        return "npu"
    return "cpu"


def _accelerator() -> ModuleType:
    return getattr(torch, device_type())


def current_device() -> torch.device:
    """The device that tensors of this process live on."""
    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device(device_type(), _accelerator().current_device())


def found_devices() -> list[tuple[str, int]]:
    """Name and bytes of memory of each accelerator of this host; none on a CPU."""
    if device_type() == "cpu":
        return []
    found = (_accelerator().get_device_properties(number) for number in range(_accelerator().device_count()))
    return [(str(one.name), int(one.total_memory)) for one in found]


def select_device(local_rank: int) -> None:
    """Bind this process to accelerator `local_rank` of its host; nothing to do on a CPU."""
    if device_type() != "cpu":
        _accelerator().set_device(local_rank % _accelerator().device_count())


def collective_backend() -> str:
    """The torch.distributed backend of this device type: nccl, hccl or gloo."""
    return _COLLECTIVE_BACKEND[device_type()]


def new_stream() -> Any:
    """A stream apart from the compute stream; None on a CPU."""
    return None if device_type() == "cpu" else _accelerator().Stream()


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Issue work on `stream`, after everything already issued on the compute stream."""
    if stream is None:
        yield
        return
    stream.wait_stream(_accelerator().current_stream())
    with _accelerator().stream(stream):
        yield


def wait_for_stream(stream: Any) -> None:
    """Let the compute stream wait for `stream`."""
    if stream is not None:
        _accelerator().current_stream().wait_stream(stream)


def record_on_stream(tensor: torch.Tensor, stream: Any) -> None:
    """Tell the allocator that `stream` uses `tensor`, so that its memory is not handed out too early."""
    if stream is not None:
        tensor.record_stream(stream)


def timestamp() -> Any:
    """A point in the compute stream's time; turn two of them into seconds with `seconds_between`."""
    if device_type() == "cpu":
        return time.perf_counter()
    event = _accelerator().Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds from `start` to `end`; waits for the device when `end` has not been reached yet."""
    if device_type() == "cpu":
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000.0
