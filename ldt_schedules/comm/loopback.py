"""A transport between threads of one process: the executor's tests and dry runs need no process group.

Messages are matched by (sender, receiver, lane) in order, and the tag is compared: a table whose sends and receives
do not match in order fails here by name, where a real lane would hand over the wrong tensor.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from dataclasses import dataclass, field

import torch

from ldt_schedules.comm.traffic import Traffic
from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.planning.channels import Lane
from ldt_schedules.planning.dependencies import What

_Wire = tuple[int, int, Lane]


@dataclass
class LoopbackHub:
    """The wires between all ranks; give each rank `hub.transport(rank)`.

    Attributes:
        timeout_s: how long a receive waits before it raises TimeoutError.
    """

    timeout_s: float = 30.0
    _wires: dict[_Wire, queue.Queue[tuple[int, torch.Tensor]]] = field(default_factory=lambda: defaultdict(queue.Queue))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def transport(self, rank: int) -> LoopbackTransport:
        return LoopbackTransport(self, rank)

    def wire(self, sender: int, receiver: int, lane: Lane) -> queue.Queue[tuple[int, torch.Tensor]]:
        with self._lock:
            return self._wires[sender, receiver, lane]

    def undelivered(self) -> int:
        """Messages sent and never received."""
        return sum(wire.qsize() for wire in self._wires.values())


class _Sent:
    def is_complete(self) -> bool:
        return True

    def wait(self) -> None:
        """A loopback send is a put into a queue: it is over when it was posted."""


@dataclass
class _Receiving:
    hub: LoopbackHub
    wire: _Wire
    spec: TensorSpec
    tag: int

    def wait(self) -> torch.Tensor:
        sender, receiver, lane = self.wire
        try:
            tag, tensor = self.hub.wire(*self.wire).get(timeout=self.hub.timeout_s)
        except queue.Empty:
            raise TimeoutError(
                f"rank {receiver} waited {self.hub.timeout_s:g} s for rank {sender} on {lane.name}"
            ) from None
        if tag != self.tag:
            raise RuntimeError(f"rank {receiver} expected message {self.tag} from rank {sender}, got {tag}")
        if tuple(tensor.shape) != self.spec.shape or tensor.dtype != self.spec.dtype:
            raise RuntimeError(
                f"rank {receiver} expected {self.spec.shape} {self.spec.dtype} from rank {sender}, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
        return tensor


@dataclass
class LoopbackTransport:
    """One rank's end of a hub."""

    hub: LoopbackHub
    rank: int
    traffic: Traffic = field(default_factory=Traffic)

    def post_send(
        self, tensor: torch.Tensor, spec: TensorSpec, *, what: What, peer: int, lane: Lane, tag: int
    ) -> _Sent:
        self.hub.wire(self.rank, peer, lane).put((tag, tensor.detach().clone()))
        self.traffic.sent[peer] += tensor.nbytes
        return _Sent()

    def post_recv(self, spec: TensorSpec, *, what: What, peer: int, lane: Lane, tag: int) -> _Receiving:
        self.traffic.received[peer] += spec.num_bytes
        return _Receiving(self.hub, (peer, self.rank, lane), spec, tag)
