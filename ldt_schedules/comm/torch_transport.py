"""The transport over torch process groups: gloo, nccl or hccl.

Each lane is a `Channel`: its own group and, on an accelerator, its own stream, so that a send that waits
for its peer holds up neither the receives nor the compute stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from ldt_schedules import device
from ldt_schedules.comm.link import Channel, Link
from ldt_schedules.comm.traffic import Traffic
from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.errors import LdtError
from ldt_schedules.planning.channels import Lane


@dataclass
class _Posted:
    """A send or receive under way; holds its buffer until it is complete."""

    work: Any
    buffer: torch.Tensor
    what: str
    timeout_s: float

    def finish(self) -> None:
        try:
            self.work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise LdtError(f"{self.what} failed or took longer than {self.timeout_s:g} s: {error}") from error


@dataclass
class _Send(_Posted):
    def is_complete(self) -> bool:
        return bool(self.work.is_completed())

    def wait(self) -> None:
        self.finish()


@dataclass
class _Recv(_Posted):
    channel: Channel

    def wait(self) -> torch.Tensor:
        self.finish()
        device.wait_for_stream(self.channel.stream)
        return self.buffer.to(device.current_device())


@dataclass
class TorchTransport:
    """Point-to-point over the link's lanes.

    Attributes:
        link: the process's end of the link.
        global_rank_of: pipeline rank -> the global rank this process exchanges tensors with there.
    """

    link: Link
    global_rank_of: Callable[[int], int]
    traffic: Traffic = field(default_factory=Traffic)

    def post_send(self, tensor: torch.Tensor, *, peer: int, lane: Lane, tag: int) -> _Send:
        channel = self.link.channels[lane]
        with device.on_stream(channel.stream):
            payload = self._on_wire(tensor.detach().contiguous(), channel)
            work = channel.group.send([payload], self.global_rank_of(peer), tag)
            device.record_on_stream(tensor, channel.stream)
        self.traffic.sent[peer] += payload.nbytes
        return _Send(work, payload, f"sending to pipeline rank {peer} on {lane.name}", self.link.timeout_s)

    def post_recv(self, spec: TensorSpec, *, peer: int, lane: Lane, tag: int) -> _Recv:
        channel = self.link.channels[lane]
        with device.on_stream(channel.stream):
            buffer = torch.empty(spec.shape, dtype=spec.dtype, device=self._wire_device(channel))
            work = channel.group.recv([buffer], self.global_rank_of(peer), tag)
        self.traffic.received[peer] += spec.num_bytes
        what = f"receiving from pipeline rank {peer} on {lane.name}"
        return _Recv(work, buffer, what, self.link.timeout_s, channel)

    def _on_wire(self, tensor: torch.Tensor, channel: Channel) -> torch.Tensor:
        return tensor.to(self._wire_device(channel))

    @staticmethod
    def _wire_device(channel: Channel) -> torch.device:
        return torch.device("cpu") if channel.backend == "gloo" else device.current_device()
