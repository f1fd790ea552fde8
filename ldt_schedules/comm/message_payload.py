"""The bytes of a message: all its tensors in one buffer, each part aligned, a mark at the end.

[ part 0 .. | part 1 .. | ... | mark ]      uint8; parts begin at multiples of 16 bytes, the mark is one int64
"""

from __future__ import annotations

from typing import Any

import torch

from ldt_schedules import device
from ldt_schedules.comm.message_header import MessageHeader, Specs
from ldt_schedules.comm.message_mark import MARK_BYTES, clear_mark, put_mark
from ldt_schedules.comm.torch_transport import ProcessTransport
from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.planning.channels import Lane

_ALIGNMENT = 16


def packed(content: Any, header: MessageHeader) -> torch.Tensor:
    """The payload of a content with a tensor in it."""
    starts, length = _places(header.parts)
    payload = torch.zeros(length + MARK_BYTES, dtype=torch.uint8, device=device.current_device())
    for part, start in zip(header.tensors_of(content), starts, strict=True):
        if part is not None:
            flat = part.detach().contiguous().view(-1).view(torch.uint8)
            payload[start : start + flat.numel()] = flat
    put_mark(payload)
    return payload


def room_for(header: MessageHeader, processes: ProcessTransport, lane: Lane) -> torch.Tensor:
    """A buffer for the payload, without the mark."""
    _, length = _places(header.parts)
    buffer = processes.buffer(TensorSpec((length + MARK_BYTES,), torch.uint8), lane)
    clear_mark(buffer)
    return buffer


def unpacked(payload: torch.Tensor, header: MessageHeader) -> Any:
    """The content, on this process's device; its tensors share the payload's memory."""
    here = payload.to(device.current_device())
    starts, _ = _places(header.parts)
    return header.content(
        [
            None if part is None else here[start : start + part.num_bytes].view(part.dtype).view(part.shape)
            for part, start in zip(header.parts, starts, strict=True)
        ]
    )


def _places(parts: Specs) -> tuple[list[int], int]:
    """Where each part begins, in bytes, and where the mark does."""
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        size = 0 if part is None else part.num_bytes
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end
