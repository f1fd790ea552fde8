"""The dependency rule as whole numbers: the same answers as `dependencies`, many times faster.

Tables have several hundred thousand actions. What the actions of one kind, stage, peer and domain take and make differs
only in the microbatch, so `Dataflow` is asked once for each such family, and the answers are shifted:

    number of a value = number of the same value of microbatch 0 + microbatch

Packed actions are of one family if their microbatches lie equally far apart: all of them count from the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.dependencies import Dataflow, Value, What

Key = tuple[Kind, int, int | None, int | None, int, tuple[int, ...] | None]


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """What an action takes and makes: add its first microbatch for the numbers of the values."""

    takes: tuple[int, ...]
    makes: tuple[int, ...]


class Numbering:
    """Numbers for the values of one table."""

    def __init__(self, flow: Dataflow, num_microbatches: int) -> None:
        self.flow, self.num_microbatches = flow, num_microbatches
        self._one_domain = flow.layout.num_domains == 1
        self._bases: dict[tuple[What, int, int], int] = {}
        self._values: list[tuple[What, int, int]] = []
        self._families: dict[Key, Family] = {}

    @property
    def size(self) -> int:
        """All numbers given out so far are below this."""
        return len(self._values) * self.num_microbatches

    def key(self, action: Action) -> Key:
        """Actions with equal keys are of one family. (The microbatches of a packed action are of one domain.)"""
        microbatches = action.microbatches
        domain = 0 if self._one_domain else self.flow.layout.domain(microbatches[0])
        packed = None if len(microbatches) == 1 else tuple(m - microbatches[0] for m in microbatches)
        return (action.kind, action.stage, action.peer, action.other, domain, packed)

    def family(self, action: Action) -> Family:
        """What `Dataflow.takes` and `makes` say about the action. Raises as they do."""
        key = self.key(action)
        family = self._families.get(key)
        if family is None:
            first = action.microbatches[0]
            takes = tuple(self.number(value) - first for value in self.flow.takes(action))
            makes = tuple(self.number(value) - first for value in self.flow.makes(action))
            family = self._families[key] = Family(takes, makes)
        return family

    def families(self, row: Iterable[Action]) -> list[Family]:
        """The `family` of each action of a row."""
        known, key_of = self._families, self.key
        return [known.get(key_of(action)) or self.family(action) for action in row]

    def received_as(self, message: int) -> int:
        """The number of the value that a message brings."""
        return self.number(self.flow.received_as(self.value(message)))

    def what(self, number: int) -> tuple[What, int, int]:
        """(what, stage, other) of the value with that number."""
        return self._values[number // self.num_microbatches]

    def value(self, number: int) -> Value:
        """The value behind a number."""
        what, stage, other = self.what(number)
        return Value(what, stage, number % self.num_microbatches, other)

    def number(self, value: Value) -> int:
        """The number of a value; a new one where it is met for the first time."""
        key = (value.what, value.stage, value.other)
        base = self._bases.get(key)
        if base is None:
            base = self._bases[key] = len(self._values) * self.num_microbatches
            self._values.append(key)
        return base + value.microbatch
