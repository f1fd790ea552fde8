"""Stops every process together, and tells each of them why.

The first process that fails leaves the cause in the store that all of them know; a thread in each looks there twenty
times a second, through a connection of its own, so that it sees the cause while the process waits for somebody who will
never answer. What fails afterwards is a consequence, and says so.

A process that is killed or frozen cannot say anything. So each counts a number of its own up while it lives, and one that
stands still for too long is the cause.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from ldt_schedules.errors import LdtError

_POLL_S = 0.05
_FAREWELL_S = 1.5
_BEAT_S = 0.5
_CAUSE, _LEFT = "abort/cause", "abort/left"
_GONE = -(10**9)
"""What a process that leaves adds to its number."""


@dataclass(frozen=True)
class Cause:
    """What a process declares when it fails: why, and where in the table if it was there."""

    text: str
    rank: int | None = None
    index: int | None = None


class Aborted(LdtError):
    """Another process has failed.

    Attributes:
        cause: what it declared.
    """

    def __init__(self, cause: Cause) -> None:
        super().__init__(f"stopped because {cause.text}")
        self.cause = cause

    @staticmethod
    def behind(error: BaseException | None) -> Aborted | None:
        """The abort that an error comes from; None: it is a beginning."""
        while error is not None and not isinstance(error, Aborted):
            error = error.__cause__
        return error


class Abort:
    """One process's view.

    Attributes:
        store: a client of its own: other users of one client wait for each other.
        processes: how many there are.
        serves: the store that this process is the server of; the others need it until they have left. None: somebody else's.
        timeout_s: how long the server waits for them.
        silence_s: a process that is not heard of for so long is taken for dead.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        processes: int,
        serves: Any = None,
        timeout_s: float = 300.0,
        silence_s: float = 10.0,
    ) -> None:
        self._store, self._rank, self._processes = store, rank, processes
        self._serves, self._timeout_s, self._silence_s = serves, timeout_s, silence_s
        self._heard: dict[int, tuple[int, float]] = {}
        self._next_beat = 0.0
        self._cause: Cause | None = None
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="ldt-abort", daemon=True)
        self._thread.start()

    def declare(self, mine: Cause) -> Cause:
        """Stop everybody; returns the cause, which is another's where another was first."""
        with self._lock:
            try:
                self._cause = Cause(**json.loads(self._store.compare_set(_CAUSE, "", json.dumps(asdict(mine)))))
            except RuntimeError:  # the store has gone, and with it everybody who could be told
                self._cause = self._cause or mine
        return self._cause

    def check(self) -> None:
        """Go on unless somebody has failed.

        Raises:
            Aborted: somebody has.
        """
        if self._cause is not None:
            raise Aborted(self._cause)

    def wait_for_cause(self, seconds: float) -> Cause | None:
        """The cause, if somebody declares one within so many seconds: a lost connection is seldom the beginning."""
        deadline = time.monotonic() + seconds
        while self._cause is None and time.monotonic() < deadline:
            time.sleep(_POLL_S / 5)
        return self._cause

    def close(self) -> None:
        """Stop looking. The process that serves the store stays until the others have left; after a failure, a moment."""
        self._stop.set()
        self._thread.join(timeout=2)
        deadline = time.monotonic() + (self._timeout_s if self._cause is None else _FAREWELL_S)
        try:
            self._store.add(_beat(self._rank), _GONE)
            left = self._store.add(_LEFT, 1)
            while self._serves is not None and left < self._processes and time.monotonic() < deadline:
                time.sleep(_POLL_S / 5)
                left = self._store.add(_LEFT, 0)
        except RuntimeError:
            return  # whoever served the store has gone, and nobody is left to wait for
        finally:
            self._serves = None

    def _watch(self) -> None:
        while self._cause is None and not self._stop.wait(_POLL_S):
            try:
                with self._lock:
                    if self._cause is None and self._store.check([_CAUSE]):
                        self._cause = Cause(**json.loads(self._store.get(_CAUSE)))
                    silent = self._silent()
            except RuntimeError:
                if self._cause is None and not self._stop.is_set():
                    self._cause = Cause("the process that serves the link's store has gone")
                return
            if silent:
                text = f"nothing has been heard of rank {silent[0]} for {self._silence_s:g} s: killed, or frozen"
                self.declare(Cause(text, silent[0]))

    def _silent(self) -> list[int]:
        """Be heard, and listen: the ranks whose number has stood still for too long."""
        now = time.monotonic()
        if now < self._next_beat:
            return []
        self._next_beat = now + _BEAT_S
        self._store.add(_beat(self._rank), 1)
        for rank in range(self._processes):
            count, since = self._heard.get(rank, (0, now))
            beat = self._store.add(_beat(rank), 0)
            self._heard[rank] = (beat, now if beat != count or beat < 0 else since)
        return [rank for rank, (_, since) in self._heard.items() if now - since > self._silence_s]


def _beat(rank: int) -> str:
    return f"abort/beat/{rank}"
