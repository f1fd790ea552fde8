"""The dependency rule as whole numbers: the same answers as `dependencies`, many times faster.

Tables have several hundred thousand actions. What the actions of one kind, stage, peer and domain take and make differs
only in the microbatch, so `Dataflow` is asked once for each such family, and the answers are shifted:

    number of a value = base of its family + microbatch
"""

from __future__ import annotations

from dataclasses import dataclass

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.dependencies import Dataflow, Value, What

Key = tuple[Kind, int, int | None, int | None, int]


@dataclass(frozen=True, slots=True)
class Family:
    """Bases of what an action takes and makes; add each of its microbatches."""

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
        domain = 0 if self._one_domain else self.flow.layout.domain(action.microbatches[0])
        return (action.kind, action.stage, action.peer, action.other, domain)

    def family(self, action: Action) -> Family:
        """What `Dataflow.takes` and `makes` say about the action, as bases. Raises as they do."""
        key = self.key(action)
        family = self._families.get(key)
        if family is None:
            one = Action(action.kind, action.stage, action.microbatches[:1], action.peer, action.other)
            takes = tuple(self.base(value) for value in self.flow.takes(one))
            family = self._families[key] = Family(takes, tuple(self.base(value) for value in self.flow.makes(one)))
        return family

    def families_of_receives(self) -> list[Family]:
        """Those of all RECVs that were asked for so far."""
        return [family for key, family in self._families.items() if key[0].is_recv]

    def takes(self, action: Action) -> list[int]:
        """The numbers of `Dataflow.takes(action)`. Raises as it does."""
        return [base + m for m in action.microbatches for base in self.family(action).takes]

    def makes(self, action: Action) -> list[int]:
        """The numbers of `Dataflow.makes(action)`. Raises as it does."""
        return [base + m for m in action.microbatches for base in self.family(action).makes]

    def what(self, number: int) -> tuple[What, int, int]:
        """(what, stage, other) of the value with that base or number."""
        return self._values[number // self.num_microbatches]

    def value(self, number: int) -> Value:
        """The value behind a number."""
        what, stage, other = self.what(number)
        return Value(what, stage, number % self.num_microbatches, other)

    def base(self, value: Value) -> int:
        """The number of the same value of microbatch 0."""
        key = (value.what, value.stage, value.other)
        base = self._bases.get(key)
        if base is None:
            base = self._bases[key] = len(self._values) * self.num_microbatches
            self._values.append(key)
        return base
