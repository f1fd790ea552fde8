"""Carries activations and gradients `[s, b, h]` between pipeline ranks whose tensor-parallel groups may differ.

Inside a site the process with the same tensor rank has the same part of the tensor: one message to it. Between the sites
each group's own layout is turned into pieces that make up *one* copy, and back:

    tp 2, whole on each     tp 2, own part each          tp 4, own part each         tp 4, whole on each
      [0123] [0123]   ─cut─►   [01] [23]   ═══link═══►   [0] [1] [2] [3]   ─gather─►   [0123] ...
                            (sequence parallel: so      (sequence parallel: done)
                             they are already)

That is mode *slices*. Where the sequence cannot be cut into as many parts, and where mode *lead* is asked for, the first
process of the group sends all of it to the first one of the other, which broadcasts it:

      [0123]   ═══link═══►   [0123]   ─broadcast─►   [0123] ...   ─cut (sequence parallel)─►   [0] [1] [2] [3]

A gradient goes the same way back. Which pieces go to whom is worked out in `topology.py`. The collectives are those of
the group's own model layers, called at the same place of the same row by all its processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ldt_schedules import device
from ldt_schedules.comm.crossing_plan import MessageSpec, crossing_of
from ldt_schedules.comm.gate import Gate
from ldt_schedules.comm.torch_transport import ProcessTransport
from ldt_schedules.comm.traffic import Traffic
from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.errors import LinkError
from ldt_schedules.planning.channels import Lane
from ldt_schedules.planning.dependencies import Value, What
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.topology import Place, Topology


@dataclass(frozen=True)
class TensorGroup:
    """A tensor-parallel group as one of its processes sees it.

    Attributes:
        group: a torch.distributed process group; None for a group of one.
        split: each process holds its part of the sequence (sequence parallelism), not all of it.
    """

    rank: int = 0
    size: int = 1
    split: bool = False
    group: Any = None

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The whole, from the equal parts of all. A collective."""
        if self.size == 1 or not part.numel():
            return part
        whole = torch.empty((part.shape[0] * self.size, *part.shape[1:]), dtype=part.dtype, device=part.device)
        self._checked(lambda: dist.all_gather_into_tensor(whole, part.contiguous(), group=self.group))
        return whole

    def broadcast(self, whole: torch.Tensor) -> torch.Tensor:
        """The first process's tensor, written over that of all. A collective."""
        if self.size > 1 and whole.numel():
            self._checked(lambda: dist.broadcast(whole, src=dist.get_global_rank(self.group, 0), group=self.group))
        return whole

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's part."""
        length = whole.shape[0] // self.size
        return whole.narrow(0, self.rank * length, length)

    def _checked(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise LinkError(f"the tensor-parallel group could not put a tensor together: {error}") from error


class _Handle(Protocol):
    def is_complete(self) -> bool: ...

    def wait(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Sends:
    pieces: Sequence[_Handle]

    def is_complete(self) -> bool:
        return all(piece.is_complete() for piece in self.pieces)

    def wait(self) -> None:
        for piece in self.pieces:
            piece.wait()


_NOTHING = _Sends(())
"""A message without an element: both ends know its shape, so it need not be sent."""


@dataclass(frozen=True, slots=True)
class _Receive:
    """Messages into `buffer`, and what the group makes of it."""

    pieces: Sequence[_Handle]
    buffer: torch.Tensor
    assemble: Callable[[torch.Tensor], torch.Tensor]
    arrived: Callable[[], None] = lambda: None

    def wait(self) -> torch.Tensor:
        for piece in self.pieces:
            piece.wait()
        self.arrived()
        return self.assemble(self.buffer.to(device.current_device()))


@dataclass
class BoundaryTransport:
    """The transport of one process of a U; a `comm.transport.Transport`.

    Attributes:
        processes: messages to single processes.
        group: this process's tensor-parallel group.
        lead: use mode *lead* for every message between the sites.
        traffic: bytes this process sent to and received from each pipeline rank.
        gate: through which all goes that leaves the site.
    """

    processes: ProcessTransport
    topology: Topology
    place: Place
    group: TensorGroup
    lead: bool = False
    traffic: Traffic = field(default_factory=Traffic)
    gate: Gate = field(default_factory=Gate)

    def plan_step(self, table: ScheduleTable, whole: Callable[[Value], TensorSpec]) -> None:
        """Write into the ledger what this process will exchange with the other site in a step that is about to begin.

        Args:
            whole: shape and dtype of a message, before context parallelism cuts it.
        """
        context = self.topology.size(self.place.site).context

        def spec(message: Value) -> MessageSpec:
            (length, *rest), dtype = whole(message).shape, whole(message).dtype
            return MessageSpec((length // context, *rest), dtype.itemsize)

        self.gate.ledger.plan(crossing_of(self.place, table, self.topology, spec, self.lead))

    def post_send(
        self, tensor: torch.Tensor, spec: TensorSpec, *, what: What, peer: int, lane: Lane, tag: int
    ) -> _Sends:
        """Start sending this process's part of the tensor `[s, b, h]`, of which `tensor` is what it holds.

        Raises:
            ResidencyError: it is to cross to the other site and is not what `spec` declares.
        """
        if not self.topology.crosses(self.place, peer):
            return _Sends([self._send(tensor, self._same_rank(peer), peer, lane, tag)])
        self.gate.check_tensor(tensor, spec, what)
        length = tensor.shape[0] * (self.group.size if self.group.split else 1)
        lead = self._leads(length)
        if lead and self.group.split:
            tensor = self.group.gather(tensor)
        offset = self._offset(length) if self.group.split and not lead else 0
        sends: list[_Handle] = []
        for piece in self.topology.pieces(self.place, peer, lead):
            start, stop = piece.bounds(length)
            part = tensor[start - offset : stop - offset]
            if part.numel():
                self.gate.count_sent(part.nbytes, what)
            sends.append(self._send(part, piece.global_rank, peer, lane, tag))
        return _Sends(sends)

    def post_recv(self, spec: TensorSpec, *, what: What, peer: int, lane: Lane, tag: int) -> _Receive:
        """Start receiving; `spec` is of what this process will hold."""
        if not self.topology.crosses(self.place, peer):
            buffer = self.processes.buffer(spec, lane)
            return _Receive([self._recv(buffer, self._same_rank(peer), peer, lane, tag)], buffer, lambda whole: whole)
        length = spec.shape[0] * (self.group.size if self.group.split else 1)
        lead = self._leads(length)
        own = length if lead else length // self.group.size
        offset = 0 if lead else self._offset(length)
        buffer = self.processes.buffer(TensorSpec((own, *spec.shape[1:]), spec.dtype), lane)
        receives: list[_Handle] = []
        sizes: list[int] = []
        for piece in self.topology.pieces(self.place, peer, lead):
            start, stop = piece.bounds(length)
            part = buffer[start - offset : stop - offset]
            if part.numel():
                sizes.append(part.nbytes)
            receives.append(self._recv(part, piece.global_rank, peer, lane, tag))
        assemble = self._assemble_lead if lead else self._assemble_slices
        return _Receive(receives, buffer, assemble, lambda: self.gate.count_received(sizes, what))

    def _assemble_lead(self, whole: torch.Tensor) -> torch.Tensor:
        whole = self.group.broadcast(whole)
        return self.group.part_of(whole).clone() if self.group.split else whole

    def _assemble_slices(self, part: torch.Tensor) -> torch.Tensor:
        return part if self.group.split else self.group.gather(part)

    def _leads(self, length: int) -> bool:
        return self.lead or length % self.topology.parts != 0

    def _offset(self, length: int) -> int:
        return self.group.rank * (length // self.group.size)

    def _same_rank(self, peer: int) -> int:
        return self.topology.peers(self.place, peer)[self.place.tensor_rank]

    def _send(self, tensor: torch.Tensor, process: int, peer: int, lane: Lane, tag: int) -> _Handle:
        if not tensor.numel():
            return _NOTHING
        self.traffic.sent[peer] += tensor.nbytes
        return self.processes.post_send(tensor, process, lane=lane, tag=tag, what=f"pipeline rank {peer}")

    def _recv(self, buffer: torch.Tensor, process: int, peer: int, lane: Lane, tag: int) -> _Handle:
        if not buffer.numel():
            return _NOTHING
        self.traffic.received[peer] += buffer.nbytes
        return self.processes.post_recv(buffer, process, lane=lane, tag=tag, what=f"pipeline rank {peer}")
