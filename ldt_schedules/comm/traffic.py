"""Counts what crosses a process's links, in bytes, by direction and peer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Running totals; `sent[peer]` and `received[peer]` are bytes of tensor payload."""

    sent: Counter[int] = field(default_factory=Counter)
    received: Counter[int] = field(default_factory=Counter)

    @property
    def sent_bytes(self) -> int:
        return self.sent.total()

    @property
    def received_bytes(self) -> int:
        return self.received.total()

    def take(self) -> tuple[int, int]:
        """`(sent, received)` bytes since the last call; counting starts again at 0."""
        both = self.sent_bytes, self.received_bytes
        self.sent.clear()
        self.received.clear()
        return both
