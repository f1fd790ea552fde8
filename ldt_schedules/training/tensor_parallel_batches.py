"""One process of a tensor-parallel group reads data, all of them have it: batches of any shapes.

megatron-core's `broadcast_data` does it for tensors of known names and kinds; it knows no tensor without elements, which
is what a microbatch without images has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ldt_schedules import device
from ldt_schedules.errors import ConfigError, LdtError

Batch = dict[str, torch.Tensor]


def over_tensor_parallel(source: Iterator[Batch] | None) -> Iterator[Batch]:
    """The batches of `source`, which the group's first process has, on all of its processes and on their device.

    Each `next` is a collective of the group.

    Raises:
        LdtError: on the other processes, when the first one's source fails; it raises its own error. A ConfigError where
            that one is.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        assert source is not None
        yield from (_on_device(batch) for batch in source)
        return
    group = parallel_state.get_tensor_model_parallel_group()
    first = dist.get_global_rank(group, 0)
    while True:
        try:
            batch, announced = _next(source)
        except Exception as error:
            kind = "mistake" if isinstance(error, ConfigError) else "failure"
            _tell(kind, first, group)
            raise
        held = _tell(announced, first, group)
        if isinstance(held, str):
            why = "the first process of the tensor-parallel group could not read its batch; its log says why"
            raise ConfigError(why) if held == "mistake" else LdtError(why)
        if held is None:
            return
        yield _broadcast(batch, held, first, group)


def _tell(what: Any, first: int, group: Any) -> Any:
    """What the first process says, on all. Objects stay inside the site."""
    held = [what]
    dist.broadcast_object_list(held, src=first, group=group)
    return held[0]


def _next(source: Iterator[Batch] | None) -> tuple[Batch, Any]:
    """The batch and what the others are told: names, shapes and dtypes; None at the end."""
    if source is None:
        return {}, None
    batch = next(source, None)
    if batch is None:
        return {}, None
    return _on_device(batch), {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}


def _broadcast(batch: Batch, kinds: dict[str, tuple[tuple[int, ...], torch.dtype]], first: int, group: Any) -> Batch:
    where = device.current_device()
    for name, (shape, dtype) in kinds.items():
        tensor = batch[name] if name in batch else torch.empty(shape, dtype=dtype, device=where)
        if tensor.numel():
            dist.broadcast(tensor, src=first, group=group)
        batch[name] = tensor
    return batch


def _on_device(batch: Batch) -> Batch:
    where = device.current_device()
    return {name: tensor.to(where).contiguous() for name, tensor in batch.items()}
