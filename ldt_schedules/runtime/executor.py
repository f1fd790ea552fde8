"""Runs one rank's row of a table: one handler for each kind of action, no decision of its own.

    for action in row:  HANDLERS[action.kind](action)

Receives are posted when the row says so and waited for by the action that needs the tensor. Sends are posted and kept
until complete. Which values an action takes and makes is asked of `planning.dependencies`, nothing is inferred here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ldt_schedules.comm.transport import RecvHandle, SendHandle, TensorSpec, Transport
from ldt_schedules.errors import LdtError
from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.channels import lane_of
from ldt_schedules.planning.dependencies import Dataflow, Value, What
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.buffers import Buffers
from ldt_schedules.runtime.recorder import StepRecorder


class StageCompute(Protocol):
    """What the executor runs on a stage. Tensors are `[s, b, h]`."""

    def forward(self, stage: int, microbatch: int, inputs: list[torch.Tensor]) -> tuple[torch.Tensor | None, Any]:
        """Run the stage; one input for each stage that feeds it, none for a head.

        Returns:
            the output for the stages that read it (None for a tail) and what `backward` will need.
        """

    def backward(self, stage: int, microbatch: int, saved: Any, output_grads: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the stage's backward; one output gradient for each stage that reads its output, none for a tail.

        Returns:
            one gradient for each input.
        """


def check_executable(table: ScheduleTable) -> None:
    """Refuse, before anything runs, what this executor cannot run.

    Raises:
        ScheduleError: naming the first such action.
    """
    for rank, row in enumerate(table.ranks):
        for action in row:
            if action.kind in (Kind.I, Kind.W):
                raise ScheduleError(
                    f"rank {rank}: {action}: this runtime runs whole backwards; write B instead of I and W"
                )
            if len(action.microbatches) > 1:
                raise ScheduleError(
                    f"rank {rank}: {action}: this runtime runs one microbatch at a time; write one action for each"
                )


@dataclass
class Executor:
    """One step of one pipeline rank.

    Attributes:
        table: the schedule; this rank runs `table.ranks[rank]`.
        compute: the stages of this rank.
        transport: to the other pipeline ranks.
        spec: microbatch -> shape and dtype of its activation on the wire.
        recorder: takes the times.
    """

    table: ScheduleTable
    rank: int
    compute: StageCompute
    transport: Transport
    spec: Callable[[int], TensorSpec]
    recorder: StepRecorder = field(default_factory=StepRecorder)

    def __post_init__(self) -> None:
        self._flow = Dataflow(self.table.layout, self.table.forward_only)
        self._buffers = Buffers()
        self._sending: list[SendHandle] = []
        self._handlers: dict[Kind, Callable[[Action], None]] = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.SEND_F: self._send,
            Kind.SEND_B: self._send,
            Kind.RECV_F: self._recv,
            Kind.RECV_B: self._recv,
        }

    def run(self) -> StepRecorder:
        """Run the row to its end.

        Raises:
            LdtError: an action failed; says which one, the cause is chained.
            AssertionError: something is left over, which the validator should have caught.
        """
        with self.recorder.step():
            for index, action in enumerate(self.table.ranks[self.rank]):
                try:
                    self._handlers[action.kind](action)
                except Exception as error:
                    raise LdtError(f"pipeline rank {self.rank}, action {index} ({action}): {error}") from error
                self._sending = [handle for handle in self._sending if not handle.is_complete()]
            with self.recorder.waiting():
                for handle in self._sending:
                    handle.wait()
        self._sending.clear()
        self._buffers.assert_empty()
        return self.recorder

    def _forward(self, action: Action) -> None:
        (microbatch,) = action.microbatches
        inputs = [self._tensor(value) for value in self._flow.takes(action)]
        for tensor in inputs:
            tensor.requires_grad_(not self.table.forward_only)
        with self.recorder.computing(action):
            output, saved = self.compute.forward(action.stage, microbatch, inputs)
        for value in self._flow.makes(action):
            # A detached alias goes to the other stage: the original belongs to the autograd graph of this one.
            self._buffers.put(value, saved if value.what is What.SAVED else output.detach())  # type: ignore[union-attr]

    def _backward(self, action: Action) -> None:
        (microbatch,) = action.microbatches
        saved_value, *grad_values = self._flow.takes(action)
        saved = self._buffers.take(saved_value)
        output_grads = [self._tensor(value) for value in grad_values]
        with self.recorder.computing(action):
            input_grads = self.compute.backward(action.stage, microbatch, saved, output_grads)
        made = [value for value in self._flow.makes(action) if value.what is not What.WEIGHT_GRAD]
        for value, grad in zip(made, input_grads, strict=True):
            self._buffers.put(value, grad)

    def _send(self, action: Action) -> None:
        (value,), (message,) = self._flow.takes(action), self._flow.makes(action)
        assert action.peer is not None
        handle = self.transport.post_send(
            self._tensor(value), peer=action.peer, lane=lane_of(self.rank, action), tag=self._tag(message)
        )
        self._sending.append(handle)

    def _recv(self, action: Action) -> None:
        (message,), (value,) = self._flow.takes(action), self._flow.makes(action)
        assert action.peer is not None
        handle = self.transport.post_recv(
            self.spec(message.microbatch),
            peer=action.peer,
            lane=lane_of(self.rank, action),
            tag=self._tag(message),
        )
        self._buffers.put(value, _Posted(handle))

    def _tensor(self, value: Value) -> torch.Tensor:
        content = self._buffers.take(value)
        if not isinstance(content, _Posted):
            return content  # type: ignore[no-any-return]
        with self.recorder.waiting():
            return content.handle.wait()

    def _tag(self, message: Value) -> int:
        """A number of its own for each message of a step, the same on both sides."""
        direction = 0 if message.what is What.ACTIVATION else 1
        num_stages = len(self.table.layout.stages)
        return ((message.microbatch * num_stages + message.stage) * num_stages + message.other) * 2 + direction


@dataclass(frozen=True, slots=True)
class _Posted:
    handle: RecvHandle
