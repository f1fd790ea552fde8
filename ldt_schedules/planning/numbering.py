"""The dependency rule as whole numbers: the same answers as `dependencies`, many times faster.

Tables have several hundred thousand actions. What the actions of one kind, stage and peer take and make differs only in
the microbatch, so `Dataflow` is asked once for each such family, and the answers are shifted:

    number of a value = number of its family * M + microbatch
"""

from __future__ import annotations

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.dependencies import Dataflow, Value, What

_Family = tuple[Kind, int, int | None, int | None, int]


class Numbering:
    """Numbers for the values of one table."""

    def __init__(self, flow: Dataflow, num_microbatches: int) -> None:
        self.flow, self.num_microbatches = flow, num_microbatches
        self._one_domain = flow.layout.num_domains == 1
        self._bases: dict[tuple[What, int, int], int] = {}
        self._families: list[tuple[What, int, int]] = []
        self._takes: dict[_Family, list[int]] = {}
        self._makes: dict[_Family, list[int]] = {}

    @property
    def size(self) -> int:
        """All numbers given out so far are below this."""
        return len(self._families) * self.num_microbatches

    def takes(self, action: Action) -> list[int]:
        """The numbers of `Dataflow.takes(action)`. Raises as it does."""
        return self._shifted(self._takes, action)

    def makes(self, action: Action) -> list[int]:
        """The numbers of `Dataflow.makes(action)`. Raises as it does."""
        return self._shifted(self._makes, action)

    def number(self, value: Value) -> int:
        """The number of one value."""
        return self._base(value) + value.microbatch

    def value(self, number: int) -> Value:
        """The value behind a number."""
        what, stage, other = self._families[number // self.num_microbatches]
        return Value(what, stage, number % self.num_microbatches, other)

    def _shifted(self, known: dict[_Family, list[int]], action: Action) -> list[int]:
        microbatches = action.microbatches
        if len(microbatches) == 1:
            m = microbatches[0]
            family = (action.kind, action.stage, action.peer, action.other, self._domain(m))
            bases = known.get(family)
            if bases is None:
                bases = known[family] = self._ask(known, action, m)
            return [base + m for base in bases]
        single = [Action(action.kind, action.stage, (m,), action.peer, action.other) for m in microbatches]
        return [number for one in single for number in self._shifted(known, one)]

    def _domain(self, microbatch: int) -> int:
        return 0 if self._one_domain else self.flow.layout.domain(microbatch)

    def _ask(self, known: dict[_Family, list[int]], action: Action, microbatch: int) -> list[int]:
        values = self.flow.takes(action) if known is self._takes else self.flow.makes(action)
        return [self._base(value) for value in values]

    def _base(self, value: Value) -> int:
        family = (value.what, value.stage, value.other)
        base = self._bases.get(family)
        if base is None:
            base = self._bases[family] = len(self._families) * self.num_microbatches
            self._families.append(family)
        return base
