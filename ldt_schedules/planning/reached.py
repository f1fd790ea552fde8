"""How far a rank came in a step that broke off: its row, with what was done, what was under way, what was not begun.

row       F s0 m0   SEND_F s0 m0 ->1   F s0 m1   …
          done      done               FAILED    not begun
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ldt_schedules.planning.actions import Action


class State(Enum):
    """Of one action; the value is its sign on a screen, so that no colour is needed."""

    DONE = "■"
    RUNNING = "▶"
    WAITING = "◇"
    FAILED = "✗"
    NOT_BEGUN = "·"
    UNKNOWN = "?"

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True, slots=True)
class Reached:
    """One rank in one step.

    Attributes:
        done: how many actions it had finished; None: nothing is known of it.
        at: the action it was at, if it was at one.
        state: of that action.
    """

    actions: tuple[Action, ...]
    done: int | None
    at: int | None = None
    state: State = State.RUNNING

    def state_of(self, index: int) -> State:
        """Of the action at a place of the row."""
        if index == self.at:
            return self.state
        if self.done is None:
            return State.UNKNOWN
        return State.DONE if index < self.done else State.NOT_BEGUN

    @property
    def states(self) -> tuple[State, ...]:
        """Of the whole row."""
        return tuple(map(self.state_of, range(len(self.actions))))
