"""What each action needs and what it makes: the dependency rule, stated once.

Every action *takes* named values and *makes* named values. A value is made once and taken once, so one
statement serves everybody: lowering sees where a value must cross ranks, the validator sees what is missing
or left over, the simulator sees when an action may start, and the executor's buffers are keyed by it.

One microbatch on its way up and back, with stage u on rank p feeding stage v on rank q:

      rank p                                    rank q
      F u ─ OUTPUT ─► SEND_F ═ ACTIVATION ═► RECV_F ─ INPUT ─► F v
      │                                                        │
    SAVED                                                    SAVED
      ▼                                                        ▼
      B u ◄ OUTPUT_GRAD ─ RECV_B ◄═ GRADIENT ═ SEND_B ◄ INPUT_GRAD ─ B v

When u and v stand on the same rank, F u makes the INPUT of v itself and B v the OUTPUT_GRAD of u: no message.
`I` makes what B makes for other stages and SAVED_W for `W`, which makes WEIGHT_GRAD (as B does).

Where nobody needs a gradient (`Layout.has_backward`: u is frozen, and so is all that feeds it) the lower half of the
drawing is missing: F u saves nothing, B v makes no INPUT_GRAD for it, and there is no B u, SEND_B or RECV_B.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Edge, Layout


class What(Enum):
    """The kinds of value in the drawing above."""

    INPUT = "input"
    OUTPUT = "output"
    SAVED = "saved activations"
    SAVED_W = "saved activations for the weight gradient"
    OUTPUT_GRAD = "output gradient"
    INPUT_GRAD = "input gradient"
    WEIGHT_GRAD = "weight gradient"
    ACTIVATION = "activation message"
    GRADIENT = "gradient message"


class Value(NamedTuple):
    """A value of `stage` for one microbatch; `other` is the stage at the far end of its edge (-1: none).

    A message belongs to the edge `stage -> other` in forward direction, whichever way it travels.
    """

    what: What
    stage: int
    microbatch: int
    other: int = -1

    @property
    def edge(self) -> Edge:
        """The edge of the layout that it goes along."""
        forward = self.what in (What.INPUT, What.OUTPUT, What.ACTIVATION)
        if self.what in (What.INPUT, What.INPUT_GRAD):
            return self.other, self.stage, forward
        return self.stage, self.other, forward

    def __str__(self) -> str:
        edge = "" if self.other < 0 else f" {_TOWARDS[self.what]} s{self.other}"
        return f"{self.what.value} of s{self.stage} m{self.microbatch}{edge}"


_TOWARDS = {
    What.INPUT: "from",
    What.OUTPUT: "to",
    What.OUTPUT_GRAD: "from",
    What.INPUT_GRAD: "to",
    What.ACTIVATION: "to",
    What.GRADIENT: "from",
}

MESSAGES = (What.ACTIVATION, What.GRADIENT)


@dataclass(frozen=True, slots=True)
class Dataflow:
    """The rule for one layout. With `forward_only` (evaluation) nothing is saved for a backward pass."""

    layout: Layout
    forward_only: bool = False

    def has_backward(self, stage: int) -> bool:
        """Does a step go through the stage backward, too?"""
        return not self.forward_only and self.layout.has_backward(stage)

    def gradients_to(self, stage: int) -> list[int]:
        """The inputs of `stage` that its backward makes a gradient for, in the order of `Layout.inputs`."""
        return [source for source in self.layout.inputs(stage) if self.layout.has_backward(source)]

    def why_needless(self, action: Action) -> str | None:
        """Why nobody needs what `action` does, if it belongs to the backward of a stage that has none."""
        if action.kind.is_forward or self.layout.has_backward(action.stage):
            return None
        return self._why_no_gradient(action.stage)

    def _why_no_gradient(self, stage: int) -> str:
        what_feeds_it = ", and so is all that feeds it" if self.layout.inputs(stage) else ""
        return f"stage {stage} is frozen{what_feeds_it}: nobody needs its gradient"

    def takes(self, action: Action) -> list[Value]:
        """The values that must exist before `action` can finish.

        Raises:
            ScheduleError: a SEND/RECV whose peer holds no neighbour of its stage; a backward, or a message of one, where
                nobody needs a gradient.
        """
        self._refuse_needless(action)
        return [value for m in action.microbatches for value in self._takes(action, m)]

    def makes(self, action: Action) -> list[Value]:
        """The values that exist once `action` is done. Raises as `takes` does."""
        self._refuse_needless(action)
        return [value for m in action.microbatches for value in self._makes(action, m)]

    def delivery(self, value: Value) -> Value:
        """What an OUTPUT or INPUT_GRAD is called once it has reached the other rank."""
        if value.what is What.OUTPUT:
            return Value(What.INPUT, value.other, value.microbatch, value.stage)
        assert value.what is What.INPUT_GRAD, value
        return Value(What.OUTPUT_GRAD, value.other, value.microbatch, value.stage)

    def received_as(self, message: Value) -> Value:
        """What a message is called once its RECV is done."""
        if message.what is What.ACTIVATION:
            return Value(What.INPUT, message.other, message.microbatch, message.stage)
        assert message.what is What.GRADIENT, message
        return Value(What.OUTPUT_GRAD, message.stage, message.microbatch, message.other)

    def _refuse_needless(self, action: Action) -> None:
        why = self.why_needless(action)
        if why is not None:
            raise ScheduleError(f"{action}: {why}")

    def _takes(self, action: Action, m: int) -> list[Value]:
        stage = action.stage
        match action.kind:
            case Kind.F:
                return [Value(What.INPUT, stage, m, source) for source in self.layout.inputs(stage)]
            case Kind.B | Kind.I:
                grads = [Value(What.OUTPUT_GRAD, stage, m, to) for to in self.layout.consumers(stage)]
                return [Value(What.SAVED, stage, m), *grads]
            case Kind.W:
                return [Value(What.SAVED_W, stage, m)]
            case Kind.SEND_F:
                return [Value(What.OUTPUT, stage, m, self.other_end(action, m))]
            case Kind.SEND_B:
                return [Value(What.INPUT_GRAD, stage, m, self.other_end(action, m))]
            case Kind.RECV_F:
                return [Value(What.ACTIVATION, self.other_end(action, m), m, stage)]
            case Kind.RECV_B:
                return [Value(What.GRADIENT, stage, m, self.other_end(action, m))]

    def _makes(self, action: Action, m: int) -> list[Value]:
        stage = action.stage
        match action.kind:
            case Kind.F:
                saved = [Value(What.SAVED, stage, m)] if self.has_backward(stage) else []
                return saved + [self._hand_over(What.OUTPUT, stage, m, to) for to in self.layout.consumers(stage)]
            case Kind.B:
                return [Value(What.WEIGHT_GRAD, stage, m), *self._input_grads(stage, m)]
            case Kind.I:
                return [Value(What.SAVED_W, stage, m), *self._input_grads(stage, m)]
            case Kind.W:
                return [Value(What.WEIGHT_GRAD, stage, m)]
            case Kind.SEND_F:
                return [Value(What.ACTIVATION, stage, m, self.other_end(action, m))]
            case Kind.SEND_B:
                return [Value(What.GRADIENT, self.other_end(action, m), m, stage)]
            case Kind.RECV_F:
                return [Value(What.INPUT, stage, m, self.other_end(action, m))]
            case Kind.RECV_B:
                return [Value(What.OUTPUT_GRAD, stage, m, self.other_end(action, m))]

    def _input_grads(self, stage: int, m: int) -> list[Value]:
        return [self._hand_over(What.INPUT_GRAD, stage, m, source) for source in self.gradients_to(stage)]

    def _hand_over(self, what: What, stage: int, m: int, other: int) -> Value:
        value = Value(what, stage, m, other)
        same_rank = self.layout.rank_of(stage, m) == self.layout.rank_of(other, m)
        return self.delivery(value) if same_rank else value

    def other_end(self, action: Action, microbatch: int) -> int:
        """The stage at the peer's end of a SEND or RECV.

        Raises:
            ScheduleError: the peer holds no neighbour of the stage for this microbatch, or two and the action does not
                say which is meant; nobody there needs the gradient.
        """
        assert action.peer is not None, action
        upstream = action.kind.peer_is_upstream
        neighbours = self.layout.inputs(action.stage) if upstream else self.layout.consumers(action.stage)
        found = self.layout.neighbours_on(neighbours, action.peer, microbatch)
        if action.other is not None:
            found = [stage for stage in found if stage == action.other]
        if action.kind is Kind.SEND_B and found:
            needless = found[0]
            found = [stage for stage in found if self.layout.has_backward(stage)]
            if not found:
                raise ScheduleError(f"{action}: {self._why_no_gradient(needless)}")
        if not found or action.peer == self.layout.rank_of(action.stage, microbatch):
            where = ", ".join(f"stage {n} on rank {self.layout.rank_of(n, microbatch)}" for n in neighbours)
            raise ScheduleError(
                f"{action}: rank {action.peer} holds no stage that stage {action.stage} "
                f"{'reads from' if upstream else 'feeds'} over a link (there is {where or 'none'})"
            )
        if len(found) > 1:
            raise ScheduleError(
                f"{action}: rank {action.peer} holds stages {' and '.join(map(str, found))}; write which is meant, "
                f"for example {action}/s{found[0]}"
            )
        return found[0]
