"""Runs one rank's row of a table: one handler for each kind of action, no decision of its own.

    for action in row:  HANDLERS[action.kind](action)

Receives are posted when the row says so and waited for by the action that needs the tensor. Sends are posted and kept
until complete. Which values an action takes and makes is asked of `planning.dependencies`, nothing is inferred here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ldt_schedules.comm.flight_recorder import FlightRecorder
from ldt_schedules.comm.transport import RecvHandle, SendHandle, Transport
from ldt_schedules.errors import LdtError
from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.channels import lane_of
from ldt_schedules.planning.dependencies import Dataflow, Value, What
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.buffers import Buffers
from ldt_schedules.runtime.recorder import StepRecorder

Content = Any
"""What one stage hands to another for one microbatch: `MegatronStages` knows one tensor `[s, b, h]`, `ModuleStages` a
tensor, several, or None. The executor moves it and never looks inside."""


class StageCompute(Protocol):
    """What the executor runs on a stage. Microbatches that an action packs are computed in one pass.

    What is handed out must be detached: the graph that made it belongs to this stage alone.
    """

    def forward(
        self, stage: int, microbatches: tuple[int, ...], inputs: list[list[Content]]
    ) -> list[tuple[Content, Any]]:
        """Run the stage; for each microbatch one input for each stage that feeds it, none for a head.

        Returns:
            for each microbatch the output for the stages that read it and what `backward` will need; the latter is
            dropped where the stage has no backward (`Dataflow.has_backward`), which should then keep nothing.
        """

    def backward(
        self, stage: int, microbatches: tuple[int, ...], saved: list[Any], output_grads: list[list[Content]]
    ) -> list[list[Content]]:
        """Run the stage's backward; for each microbatch one output gradient for each stage that reads it, none for a tail.

        Returns:
            for each microbatch one gradient for each of its inputs that has a backward (`Dataflow.gradients_to`).
        """


class ActionError(LdtError):
    """An action failed.

    Attributes:
        rank, index: its place in the table.
    """

    def __init__(self, rank: int, index: int, action: Action, cause: BaseException) -> None:
        super().__init__(f"pipeline rank {rank}, action {index} ({action}): {cause}")
        self.rank, self.index = rank, index


def check_executable(table: ScheduleTable, packing: bool = False) -> None:
    """Refuse, before anything runs, what this executor cannot run.

    Args:
        packing: can the stages compute several microbatches in one pass?

    Raises:
        ScheduleError: naming the first such action.
    """
    for rank, row in enumerate(table.ranks):
        for action in row:
            if action.kind in (Kind.I, Kind.W):
                raise ScheduleError(
                    f"rank {rank}: {action}: this runtime runs whole backwards; write B instead of I and W"
                )
            if len(action.microbatches) > 1 and not packing:
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
        spec: what the transport is told about a message that is to come: of an activation or gradient `[s, b, h]`, shape and
            dtype.
        blocking: wait for each message before going on, instead of posting it and waiting at first use.
        recorder: takes the times.
        flight: is told what this rank is at.
    """

    table: ScheduleTable
    rank: int
    compute: StageCompute
    transport: Transport
    spec: Callable[[Value], Any]
    blocking: bool = False
    recorder: StepRecorder = field(default_factory=StepRecorder)
    flight: FlightRecorder = field(default_factory=FlightRecorder)

    def __post_init__(self) -> None:
        self._flow = Dataflow(self.table.layout, self.table.forward_only)
        self._buffers = Buffers()
        self._sending: deque[SendHandle] = deque()
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
            ActionError: an action failed; says which one, the cause is chained.
            AssertionError: something is left over, which the validator should have caught.
        """
        with self.recorder.step():
            for index, action in enumerate(self.table.ranks[self.rank]):
                self.flight.begin(index, action)
                try:
                    self._handlers[action.kind](action)
                except Exception as error:
                    raise ActionError(self.rank, index, action, error) from error
                self.flight.end()
                while self._sending and self._sending[0].is_complete():
                    self._sending.popleft()
            with self.recorder.waiting(), self.flight.waiting("its last messages to be taken"):
                for handle in self._sending:
                    handle.wait()
        self._sending.clear()
        self._buffers.assert_empty()
        return self.recorder

    def _forward(self, action: Action) -> None:
        inputs = [[self._content(value) for value in self._flow.takes(one)] for one in _unpacked(action)]
        with self.recorder.computing(action):
            results = self.compute.forward(action.stage, action.microbatches, inputs)
        for one, (output, saved) in zip(_unpacked(action), results, strict=True):
            for value in self._flow.makes(one):
                self._buffers.put(value, saved if value.what is What.SAVED else output)

    def _backward(self, action: Action) -> None:
        saved: list[Any] = []
        output_grads: list[list[Content]] = []
        for one in _unpacked(action):
            saved_value, *grads = self._flow.takes(one)
            saved.append(self._buffers.take(saved_value))
            output_grads.append([self._content(value) for value in grads])
        with self.recorder.computing(action):
            input_grads = self.compute.backward(action.stage, action.microbatches, saved, output_grads)
        for one, gradients in zip(_unpacked(action), input_grads, strict=True):
            made = [value for value in self._flow.makes(one) if value.what is not What.WEIGHT_GRAD]
            for value, gradient in zip(made, gradients, strict=True):
                self._buffers.put(value, gradient)

    def _send(self, action: Action) -> None:
        """One message for each microbatch, so that a peer may receive them packed or one by one."""
        assert action.peer is not None
        for value, message in zip(self._flow.takes(action), self._flow.makes(action), strict=True):
            handle = self.transport.post_send(
                self._content(value),
                self.spec(message),
                what=message.what,
                peer=action.peer,
                lane=lane_of(self.rank, action),
                tag=self._tag(message),
            )
            self._sending.append(handle)
            if self.blocking:
                with self.recorder.waiting(), self.flight.waiting(action):
                    handle.wait()

    def _recv(self, action: Action) -> None:
        assert action.peer is not None
        for message, value in zip(self._flow.takes(action), self._flow.makes(action), strict=True):
            handle = self.transport.post_recv(
                self.spec(message),
                what=message.what,
                peer=action.peer,
                lane=lane_of(self.rank, action),
                tag=self._tag(message),
            )
            self._buffers.put(value, _Posted(handle, action))
            if self.blocking:
                self._buffers.put(value, self._content(value))

    def _content(self, value: Value) -> Content:
        content = self._buffers.take(value)
        if not isinstance(content, _Posted):
            return content
        with self.recorder.waiting(), self.flight.waiting(content.action):
            return content.handle.wait()

    def _tag(self, message: Value) -> int:
        """A number of its own for each message of a step, the same on both sides."""
        direction = 0 if message.what is What.ACTIVATION else 1
        num_stages = len(self.table.layout.stages)
        return ((message.microbatch * num_stages + message.stage) * num_stages + message.other) * 2 + direction


def _unpacked(action: Action) -> list[Action]:
    """The action for each of its microbatches."""
    if len(action.microbatches) == 1:
        return [action]
    return [Action(action.kind, action.stage, (m,), action.peer, action.other) for m in action.microbatches]


@dataclass(frozen=True, slots=True)
class _Posted:
    handle: RecvHandle
    action: Action
