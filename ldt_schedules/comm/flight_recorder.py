"""What this process did last, what it is at, and what it waits for: cheap enough to be always on.

Written down when the run fails (`record`), one file a process; `ldt doctor --post-mortem` puts them together.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldt_schedules.comm.cause import Cause

FORMAT = "ldt-flight/1"
_LAST_EVENTS = 4000


@dataclass
class Now:
    """What a process is at.

    Attributes:
        what: an action, or what else a step is made of, in words.
        index: of the action in its row.
        since: monotonic seconds, of `waits_for` where there is one.
    """

    what: object
    index: int | None
    since: float
    waits_for: object | None = None


@dataclass
class FlightRecorder:
    """Of one process. The watch's thread reads what the process writes; a line that is a moment old does no harm.

    Attributes:
        step: forward-backward calls that were begun, the running one included; -1 before the first.
        done: actions of its row that are finished in this step.
        updates: steps that the optimizer has applied.
        table: of the step, for `snapshot`: called then, JSON types.
    """

    step: int = -1
    done: int = 0
    updates: int = 0
    table: Any = None
    now: Now | None = None
    events: deque[tuple[float, int, object, str]] = field(default_factory=lambda: deque(maxlen=_LAST_EVENTS))

    def begin_step(self, step: int, table: Any) -> None:
        self.step, self.done, self.table = step, 0, table

    def begin(self, index: int, action: object) -> None:
        """An action of the row; it ends when the next one begins, or with `end`."""
        self.now = Now(action, index, time.monotonic())
        self.events.append((time.time(), self.step, action, "begin"))

    def end(self) -> None:
        if self.now is not None and self.now.index is not None:
            self.done = self.now.index + 1
            self.events.append((time.time(), self.step, self.now.what, "end"))
        self.now = None

    @contextmanager
    def waiting(self, what: object) -> Iterator[None]:
        """Inside, this process waits for `what`."""
        before = self.now
        self.now = Now(
            what if before is None else before.what, None if before is None else before.index, time.monotonic(), what
        )
        yield
        # After an error it stays as it is: that is what the process waited for when it failed.
        self.now = before

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside, this process is at something that is no action of the table."""
        before, self.now = self.now, Now(what, None, time.monotonic())
        self.events.append((time.time(), self.step, what, "begin"))
        yield
        self.events.append((time.time(), self.step, what, "end"))
        self.now = before

    def where(self) -> tuple[int | None, int | None, str | None]:
        """Step, index in the row and action, as far as it is at one."""
        now = self.now
        step = self.step if self.step >= 0 else None
        return (step, None, None) if now is None else (step, now.index, str(now.what))

    def snapshot(self) -> dict[str, Any]:
        """Of JSON types."""
        now = self.now
        return {
            "step": self.step,
            "steps_applied": self.updates,
            "done": self.done,
            "table": None if self.table is None else self.table(),
            "now": None
            if now is None
            else {
                "what": str(now.what),
                "index": now.index,
                "waits_for": None if now.waits_for is None else str(now.waits_for),
                "since_s": round(time.monotonic() - now.since, 3),
            },
            "events": [[round(at, 6), step, str(what), which] for at, step, what, which in list(self.events)],
            "stack": _main_stack(),
        }


def record(
    flight: FlightRecorder, *, process: str, place: dict[str, Any], cause: Cause | None, last_heard_s: dict[str, float]
) -> dict[str, Any]:
    """The content of a process's file."""
    return {
        "format": FORMAT,
        "process": process,
        **place,
        "written_unix_s": time.time(),
        "cause": None if cause is None else {key: value for key, value in cause.to_message().items() if key != "rank"},
        "own_failure": cause is not None and cause.process == process,
        "last_heard_s": last_heard_s,
        **flight.snapshot(),
    }


def _main_stack() -> list[str]:
    """Where the main thread stands, the innermost first: files and lines, none of the values."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return []
    return [f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in reversed(traceback.extract_stack(frame))]
