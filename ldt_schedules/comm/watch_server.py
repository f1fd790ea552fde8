"""Where all processes of a run are heard, in the process that also serves the link's store.

    edge rank 0 ──beat, beat, …──►┐                ┌──► cause, once, to everybody
    cloud rank 0 ─beat, beat, …──►│  watch server  │
    cloud rank 1 ─beat ✕          ┘                └──► beats, with who was last heard of when

A process that is killed cannot say so, but the system closes its connection at once, and one that is left without a word of
parting is the cause. One that is frozen, or whose machine or link is lost, falls silent; so does the server for all.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ldt_schedules.comm.cause import Cause
from ldt_schedules.comm.json_lines import Garbage, JsonLines
from ldt_schedules.comm.saying import say

TURN_S = 0.2
"""How often, at least, either end looks around."""
BEAT_S = 0.5
SLEPT_S = 2.0
"""A turn that took so long: this process itself was frozen, or had no core, and knows nothing of the others' silence."""
SEND_TIMEOUT_S = 1.0
_HELLO_WITHIN_S = 5.0
_MOST_STRANGERS = 64
STEADY = "steady"
"""What a beat says once the process's first step is done."""


@dataclass
class _Stranger:
    lines: JsonLines
    address: str
    since: float


@dataclass
class _Member:
    rank: int
    lines: JsonLines
    heard: float
    steady: bool = False


@dataclass
class WatchServer:
    """Serves from its making to `close`.

    Attributes:
        names: of all processes, by rank.
        sites: theirs.
        silence_s: one that is not heard of for so long is taken for lost; 0: never.
        starting_s: the same until its first step is done.
        address: `port`, and `token`, without which nobody is let in.
    """

    names: Sequence[str]
    sites: Sequence[str]
    silence_s: float
    starting_s: float
    port: int = field(init=False)
    token: str = field(init=False)

    def __post_init__(self) -> None:
        self.token = secrets.token_hex(16)
        self._listener = _listener()
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._members: dict[int, _Member] = {}
        self._left: set[int] = set()
        self._cause: Cause | None = None
        self._sent_away = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="ldt-watch-server", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Stay until all have left, which others may need, but not longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while len(self._left) < len(self.names) and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(TURN_S / 20)
        self._ending.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(timeout=2)

    def _serve(self) -> None:
        last = time.monotonic()
        next_beat = 0.0
        while not self._ending.is_set():
            for key, _ in self._selector.select(TURN_S):
                try:
                    self._look(key)
                except Exception as error:  # whatever somebody sends, the others are still heard
                    say(f"ldt: the watch lost a connection: {type(error).__name__}: {error}")
                    if isinstance(key.data, _Member):
                        self._lose(key.data)
                    elif key.data is not None:
                        self._drop(key.fileobj)
            now = time.monotonic()
            if now - last > SLEPT_S:
                for member in self._members.values():
                    member.heard = now
            last = now
            if now >= next_beat:
                next_beat = now + BEAT_S
                self._judge(now)
                self._beat(now)
        for key in list(self._selector.get_map().values()):
            self._drop(key.fileobj)
        self._selector.close()

    def _look(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._listener:
            self._accept()
        elif isinstance(key.data, _Stranger):
            self._meet(key.data)
        else:
            self._hear(key.data)

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:  # no file descriptor left, perhaps
            time.sleep(TURN_S / 4)
            return
        stranger = _Stranger(JsonLines(connection, SEND_TIMEOUT_S), str(address[0]), time.monotonic())
        if len(self._strangers()) >= _MOST_STRANGERS + len(self.names):
            stranger.lines.close()
            return
        self._selector.register(connection, selectors.EVENT_READ, stranger)

    def _strangers(self) -> list[_Stranger]:
        return [key.data for key in self._selector.get_map().values() if isinstance(key.data, _Stranger)]

    def _meet(self, stranger: _Stranger) -> None:
        """Somebody's first words: his rank and the token that stands in the store, or he is sent away."""
        try:
            messages = stranger.lines.receive()
            if messages == []:
                return
            rank = self._rank_of(messages[0]) if messages else None
        except Garbage:
            rank = None
        if rank is None:
            self._send_away(stranger)
            return
        member = _Member(rank, stranger.lines, time.monotonic())
        self._selector.modify(stranger.lines.connection, selectors.EVENT_READ, member)
        self._members[rank] = member
        member.lines.send({"welcome": True})
        if self._cause is not None:
            member.lines.send({"cause": self._cause.to_message()})
        self._take(member, (messages or [])[1:])

    def _rank_of(self, hello: dict[str, Any]) -> int | None:
        rank, token = hello.get("rank"), hello.get("token")
        said = token.encode(errors="replace") if isinstance(token, str) else b""
        known = hmac.compare_digest(said, self.token.encode())
        fits = type(rank) is int and 0 <= rank < len(self.names) and rank not in self._members
        return rank if known and fits else None

    def _send_away(self, stranger: _Stranger) -> None:
        self._drop(stranger.lines.connection)
        self._sent_away += 1
        if self._sent_away == 1:
            say(f"ldt: a stranger at {stranger.address} spoke to port {self.port} and was sent away")

    def _hear(self, member: _Member) -> None:
        try:
            messages = member.lines.receive()
        except Garbage:
            messages = None
        if messages is None:
            self._lose(member)
        else:
            self._take(member, messages)

    def _take(self, member: _Member, messages: list[dict[str, Any]]) -> None:
        member.heard = time.monotonic()
        for message in messages:
            if "cause" in message:
                try:
                    self._declare(Cause.from_message(message["cause"]))
                except ValueError:
                    self._declare(Cause(f"{self.names[member.rank]} failed", member.rank))
            elif "beat" in message:
                member.steady = member.steady or message["beat"] == STEADY
            elif "bye" in message:
                self._left.add(member.rank)
                self._lose(member)
                return

    def _lose(self, member: _Member) -> None:
        self._drop(member.lines.connection)
        del self._members[member.rank]
        if member.rank not in self._left:
            self._left.add(member.rank)
            name = self.names[member.rank]
            self._declare(Cause(gone(name), member.rank, process=name))

    def _judge(self, now: float) -> None:
        for stranger in self._strangers():
            if now - stranger.since > _HELLO_WITHIN_S:
                self._send_away(stranger)
        if not self.silence_s or self._cause is not None:
            return
        for member in self._members.values():
            limit = limit_of_silence(self.silence_s, self.starting_s, member.steady)
            if now - member.heard > limit:
                name = self.names[member.rank]
                self._declare(Cause(silence(name, limit), member.rank, process=name))
                return

    def _beat(self, now: float) -> None:
        """Tell everybody of each site's process that was not heard of for longest."""
        ages: dict[str, float] = {}
        for member in self._members.values():
            site = self.sites[member.rank]
            ages[site] = max(ages.get(site, 0.0), round(now - member.heard, 3))
        for member in list(self._members.values()):
            member.lines.send({"heard": ages})

    def _declare(self, cause: Cause) -> None:
        """The first cause is everybody's."""
        if self._cause is None:
            self._cause = cause
        for member in list(self._members.values()):
            member.lines.send({"cause": self._cause.to_message()})

    def _drop(self, connection: Any) -> None:
        self._selector.unregister(connection)
        connection.close()


def limit_of_silence(silence_s: float, starting_s: float, steady: bool) -> float:
    """Until the first step is done it is `starting_s`: who builds a model or an index may hold Python's lock for long."""
    return silence_s if steady else max(silence_s, starting_s)


def gone(name: str) -> str:
    """The text for one whose connection was closed."""
    return f"{name} has gone without a word: killed (out of memory?) or stopped"


def silence(name: str, seconds: float) -> str:
    """The text for one who is not heard of."""
    return f"nothing has been heard of {name} for {seconds:g} s: frozen, or its machine or the link to it is lost"


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    return socket.create_server(("", 0), backlog=128)
