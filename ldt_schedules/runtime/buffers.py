"""Where values wait between the action that makes them and the one that takes them.

Keyed by `planning.dependencies.Value`: the runtime moves tensors by the same names by which the table was validated.
"""

from __future__ import annotations

from typing import Any

from ldt_schedules.planning.dependencies import Value


class Buffers:
    """A value is put once, taken once, and at the end of a step nothing is left."""

    def __init__(self) -> None:
        self._values: dict[Value, Any] = {}

    def put(self, value: Value, content: Any) -> None:
        assert value not in self._values, f"{value} was made twice"
        self._values[value] = content

    def take(self, value: Value) -> Any:
        assert value in self._values, f"{value} was taken before it was made"
        return self._values.pop(value)

    def __len__(self) -> int:
        return len(self._values)

    def assert_empty(self) -> None:
        """Raises AssertionError naming everything that was made and never taken."""
        assert not self._values, "left over after the step: " + "; ".join(str(value) for value in self._values)
