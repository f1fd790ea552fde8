"""Stops every process of a run together, and tells each of them why.

Each process is connected with the watch server (`watch_server.py`), apart from all that carries tensors, and a thread of
it listens there. So it learns of the cause while the process itself waits for somebody who will never answer.
"""

from __future__ import annotations

import hashlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldt_schedules.comm.cause import Aborted, Cause
from ldt_schedules.comm.json_lines import Garbage, JsonLines
from ldt_schedules.comm.watch_server import (
    BEAT_S,
    SEND_TIMEOUT_S,
    SLEPT_S,
    STEADY,
    TURN_S,
    WatchServer,
    gone,
    limit_of_silence,
    silence,
)
from ldt_schedules.errors import LinkError

_ANSWER_WITHIN_S = 1.0
_FAREWELL_S = 1.0
_KEY = "watch"
_MAX_TEXT = 4000
_AGAIN_S = 0.2


@dataclass(frozen=True)
class Members:
    """Who takes part, by rank.

    Attributes:
        names: for messages, `cloud rank 1`.
        sites: `edge`, `cloud`; without sites all the same.
        server: the rank that serves.
    """

    names: Sequence[str]
    sites: Sequence[str]
    server: int


@dataclass
class Watch:
    """One process's end of it, from its making to `close`.

    Attributes:
        silence_s: who is not heard of for so long is taken for lost; 0: only who has gone.
        timeout_s: for getting in, and for how long the server stays for the others at the end.
        steady: see `settle`.
        on_cause: called once, mostly in the watch's thread, before anybody else here learns of the cause.
        on_turn: called in that thread a few times a second with how long ago each site was last heard of, seconds.
    """

    store: Any
    host: str
    rank: int
    members: Members
    silence_s: float
    timeout_s: float
    steady: bool = field(default=False, init=False)
    on_cause: Callable[[Cause], None] = field(default=lambda cause: None)
    on_turn: Callable[[dict[str, float]], None] = field(default=lambda heard: None)

    def __post_init__(self) -> None:
        self._server: WatchServer | None = None
        if self.rank == self.members.server:
            self._server = WatchServer(self.members.names, self.members.sites, self.silence_s, self.timeout_s)
            self.store.set(_KEY, f"{self._server.port} {self._server.token}")
        self._cause: Cause | None = None
        self._learned = False
        self._known, self._stop, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._heard: tuple[float, dict[str, float]] = (time.monotonic(), {})
        self._lines = self._joined()
        self._thread = threading.Thread(target=self._listen, name="ldt-watch", daemon=True)
        self._thread.start()

    @property
    def run(self) -> str:
        """The same for all processes of this start of the run, and for no other."""
        return hashlib.sha256(self._token.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        return self.members.names[self.rank]

    def settle(self) -> None:
        """The first step is done, in which all processes have taken part: from now on `silence_s` is the limit of silence."""
        if not self.steady:
            self.steady = True
            self._send({"beat": STEADY})

    def declare(self, mine: Cause) -> Cause:
        """Stop everybody; returns the cause, which is another's where another was first."""
        if self._cause is None:
            mine = replace(mine, text=mine.text[:_MAX_TEXT])
            self._send({"cause": mine.to_message()})
            if threading.current_thread() is not self._thread:
                self._known.wait(_ANSWER_WITHIN_S)
        if self._cause is None:  # nobody could be told
            self._learn(mine)
        return self._cause or mine

    def check(self) -> None:
        """Go on unless somebody has failed.

        Raises:
            Aborted: somebody has.
        """
        if self._cause is not None:
            raise Aborted(self._cause)

    def wait_for_cause(self, seconds: float) -> Cause | None:
        """The cause, if somebody declares one within so many seconds: a lost connection is seldom the beginning."""
        self._known.wait(seconds)
        return self._cause

    def last_heard_s(self) -> dict[str, float]:
        """How long ago the server heard of each site's most silent process; of the server itself, since its last word."""
        at, ages = self._heard
        since = time.monotonic() - at
        return {site: age + since for site, age in ages.items()}

    def close(self, abandon: bool = False) -> None:
        """Leave. The process that serves stays until the others have left; after a failure, or to abandon them, a moment."""
        self._stop.set()
        self._send({"bye": True})
        self._lines.wake()
        self._thread.join(timeout=2)
        self._lines.close()
        if self._server is not None:
            self._server.close(_FAREWELL_S if abandon or self._cause is not None else self.timeout_s)
            self._server = None

    def _joined(self) -> JsonLines:
        """Connected, and welcome there: a server that many come to at once may close a door, and opens it again."""
        port, self._token = self.store.get(_KEY).decode().split()
        deadline, problem = time.monotonic() + self.timeout_s, "it does not answer"
        while time.monotonic() < deadline:
            try:
                connection = socket.create_connection((self.host, int(port)), timeout=deadline - time.monotonic())
                lines = JsonLines(connection, SEND_TIMEOUT_S)
                lines.send({"rank": self.rank, "token": self._token})
                if self._is_welcome(lines, deadline):
                    return lines
                lines.close()
            except OSError as error:
                problem = str(error)
            time.sleep(_AGAIN_S)
        raise LinkError(
            f"{self.name} cannot reach port {port} of {self.host}, where {self.members.names[self.members.server]} listens for "
            f"failures: {problem}; the sites' processes must be able to connect to each other on any port"
        )

    def _is_welcome(self, lines: JsonLines, deadline: float) -> bool:
        while time.monotonic() < deadline:
            try:
                messages = lines.receive()
            except Garbage:
                return False
            if messages is None:
                return False
            for message in messages:
                if "cause" in message:
                    self._learn(_cause_in(message))
            if messages:
                return True
        return False

    def _send(self, message: dict[str, Any]) -> bool:
        with self._lock:
            return self._lines.send(message)

    def _listen(self) -> None:
        last, next_beat = time.monotonic(), 0.0
        readable = selectors.DefaultSelector()  # not select(), which knows the first 1024 files only
        readable.register(self._lines, selectors.EVENT_READ)
        while self._cause is None and not self._stop.is_set():
            if readable.select(TURN_S) and not self._receive():
                break
            now = time.monotonic()
            if now - last > SLEPT_S:
                self._heard = (now, self._heard[1])
            last = now
            if now >= next_beat:
                next_beat = now + BEAT_S
                self._send({"beat": STEADY if self.steady else True})
                self._judge(now)
                self.on_turn(self.last_heard_s())
        readable.close()

    def _receive(self) -> bool:
        """Take what has come; is there still somebody to listen to?"""
        try:
            messages = self._lines.receive()
        except Garbage:
            messages = None
        if messages is None:
            if not self._stop.is_set():
                server = self.members.names[self.members.server]
                self._learn(Cause(gone(server), self.members.server, process=server))
            return False
        for message in messages:
            if "cause" in message:
                self._learn(_cause_in(message))
                return False
            self._heard = (time.monotonic(), message.get("heard", {}))
        return True

    def _judge(self, now: float) -> None:
        limit = limit_of_silence(self.silence_s, self.timeout_s, self.steady)
        if self.silence_s and now - self._heard[0] > limit:
            server = self.members.names[self.members.server]
            self.declare(Cause(silence(server, limit), self.members.server, process=server))

    def _learn(self, cause: Cause) -> None:
        with self._lock:
            if self._learned:
                return
            self._learned = True
        self.on_cause(cause)
        self._cause = cause
        self._known.set()


def _cause_in(message: dict[str, Any]) -> Cause:
    try:
        return Cause.from_message(message["cause"])
    except ValueError:  # a server of another version
        return Cause("a process failed, and told of it in words that this version does not know")
