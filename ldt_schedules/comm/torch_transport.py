"""Point-to-point messages between processes over torch process groups: gloo, nccl or hccl.

Each lane is a `Channel`: its own group and, on an accelerator, its own stream, so that a send that waits
for its peer holds up neither the receives nor the compute stream. Which processes a message goes to is not decided
here: see `boundary.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from ldt_schedules import device
from ldt_schedules.comm.link import Channel, Link
from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.errors import LinkError
from ldt_schedules.planning.channels import Lane


@dataclass
class _Posted:
    """A send or receive under way; holds its buffer until it is complete."""

    work: Any
    buffer: torch.Tensor
    what: str
    timeout_s: float

    def is_complete(self) -> bool:
        return bool(self.work.is_completed())

    def wait(self) -> None:
        try:
            self.work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise LinkError(f"{self.what} failed or took longer than {self.timeout_s:g} s: {error}") from error


@dataclass
class _Receiving(_Posted):
    channel: Channel

    def wait(self) -> None:
        super().wait()
        device.wait_for_stream(self.channel.stream)


@dataclass
class ProcessTransport:
    """This process's messages to and from other processes, by their global ranks.

    `what` names the other end in an error message.
    """

    link: Link

    def post_send(self, tensor: torch.Tensor, process: int, *, lane: Lane, tag: int, what: str) -> _Posted:
        """Start sending; the handle keeps what is sent alive."""
        channel = self.link.channels[lane]
        with device.on_stream(channel.stream):
            payload = tensor.detach().contiguous().to(_wire_device(channel))
            work = channel.group.send([payload], process, tag)
            device.record_on_stream(tensor, channel.stream)
        return _Posted(work, payload, f"sending to {what} on {lane.name}", self.link.timeout_s)

    def buffer(self, spec: TensorSpec, lane: Lane) -> torch.Tensor:
        """Room for a message, where the lane's backend can write."""
        channel = self.link.channels[lane]
        with device.on_stream(channel.stream):
            return torch.empty(spec.shape, dtype=spec.dtype, device=_wire_device(channel))

    def post_recv(self, buffer: torch.Tensor, process: int, *, lane: Lane, tag: int, what: str) -> _Receiving:
        """Start receiving into `buffer`, a contiguous (part of a) `self.buffer(...)`."""
        channel = self.link.channels[lane]
        with device.on_stream(channel.stream):
            work = channel.group.recv([buffer], process, tag)
        return _Receiving(work, buffer, f"receiving from {what} on {lane.name}", self.link.timeout_s, channel)


def _wire_device(channel: Channel) -> torch.device:
    return torch.device("cpu") if channel.backend == "gloo" else device.current_device()
