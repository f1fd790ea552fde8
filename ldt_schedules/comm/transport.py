"""What the runtime asks of a transport: post now, wait at first use, keep everything until then.

A receive is posted early into its own buffer; a send keeps its tensor alive until the handle is complete.
gloo loses a message whose handle is dropped, and no backend says so; hence handles are objects that somebody
holds, and the runtime checks at the end of a step that none is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ldt_schedules.comm.traffic import Traffic
from ldt_schedules.planning.channels import Lane
from ldt_schedules.planning.dependencies import What


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor on the wire; an activation is `[s, b, h]` as the sender's rank holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SendHandle(Protocol):
    """A posted send."""

    def is_complete(self) -> bool:
        """May the tensor be freed? Never blocks."""

    def wait(self) -> None:
        """Block until it may, or raise when the link's deadline has passed."""


class RecvHandle(Protocol):
    """A posted receive."""

    def wait(self) -> Any:
        """Block until the content is there and return it, or raise when the link's deadline has passed."""


class Transport(Protocol):
    """Point-to-point transfers between pipeline ranks, peers always named.

    A transport that knows shapes beforehand (`BoundaryTransport`) carries one tensor and is told its `TensorSpec`; one whose
    messages describe themselves (`MessageTransport`) carries several tensors or none.
    """

    traffic: Traffic

    def post_send(self, content: Any, spec: Any, /, *, what: What, peer: int, lane: Lane, tag: int) -> SendHandle:
        """Start sending `content`, which `spec` declares, to pipeline rank `peer`."""

    def post_recv(self, spec: Any, /, *, what: What, peer: int, lane: Lane, tag: int) -> RecvHandle:
        """Start receiving from pipeline rank `peer` what `spec` tells of."""
