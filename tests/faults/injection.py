"""A fault at a chosen place of a run: a process that raises, is killed or freezes there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ldt_schedules.comm.flight_recorder import FlightRecorder

RAISE, KILL, STOP = "raise", "kill", "stop"


@dataclass(frozen=True)
class Fault:
    """What happens where.

    Attributes:
        how: RAISE, KILL or STOP (SIGSTOP).
        process: `cloud rank 1`.
        step: the forward-backward call in which it happens, from 0.
        index: of the action in the process's row; None: where it begins to do, or to wait for, what begins with `phase`.
        at: file into which the time of the fault is written.
    """

    how: str
    process: str
    step: int
    index: int | None
    phase: str | None
    at: Path

    def happen(self) -> None:
        self.at.write_text(repr(time.time()))
        if self.how == RAISE:
            raise ValueError("planted fault")
        os.kill(os.getpid(), signal.SIGKILL if self.how == KILL else signal.SIGSTOP)


class FaultyRecorder(FlightRecorder):
    """A flight recorder in whose process something happens: it is told of everything that the process begins."""

    fault: Fault | None = None
    happened = False

    def begin(self, index: int, action: object) -> None:
        super().begin(index, action)
        if self._due() and index == self.fault.index:  # type: ignore[union-attr]
            self._happen()

    @contextmanager
    def waiting(self, what: object) -> Iterator[None]:
        with super().waiting(what):
            if self._due() and str(what).startswith(self.fault.phase or "\n"):  # type: ignore[union-attr]
                self._happen()
            yield

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        with super().doing(what):
            if self._due() and str(what).startswith(self.fault.phase or "\n"):  # type: ignore[union-attr]
                self._happen()
            yield

    def _due(self) -> bool:
        return self.fault is not None and self.step == self.fault.step and not self.happened

    def _happen(self) -> None:
        self.happened = True
        assert self.fault is not None
        self.fault.happen()
