"""The watch: who goes without a word, who is silent, and strangers."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from typing import Any

import pytest
import torch.distributed as dist

from ldt_schedules.comm.cause import Aborted, Cause
from ldt_schedules.comm.watch import Members, Watch
from ldt_schedules.comm.watch_server import WatchServer

NAMES = ("edge rank 0", "cloud rank 0", "cloud rank 1")
MEMBERS = Members(NAMES, ("edge", "cloud", "cloud"), server=1)


class Trio:
    """Three processes' ends in one process."""

    def __init__(self, silence_s: float = 0.0, steady: bool = True) -> None:
        store = dist.HashStore()
        self.told: list[list[Cause]] = [[], [], []]
        self.ends: list[Watch] = [None] * 3  # type: ignore[list-item]
        for rank in (1, 0, 2):
            self.ends[rank] = Watch(
                store, "127.0.0.1", rank, MEMBERS, silence_s, timeout_s=5.0, on_cause=self.told[rank].append
            )
            if steady:
                self.ends[rank].settle()

    def __enter__(self) -> Trio:
        return self

    def __exit__(self, *error: object) -> None:
        for rank in (0, 2, 1):
            self.ends[rank].close()

    def causes(self, within_s: float = 3.0) -> list[str | None]:
        found = [end.wait_for_cause(within_s) for end in self.ends]
        return [None if one is None else one.text for one in found]

    @property
    def port(self) -> int:
        assert self.ends[1]._server is not None
        return self.ends[1]._server.port


def test_the_first_cause_is_everybodys():
    with Trio() as trio:
        mine = trio.ends[2].declare(Cause("the first", 2, process=NAMES[2]))
        late = trio.ends[0].declare(Cause("a later one", 0))
        assert mine.text == late.text == "the first"
        assert trio.causes() == ["the first"] * 3
        assert [[one.text for one in told] for told in trio.told] == [["the first"]] * 3
        with pytest.raises(Aborted, match="the first"):
            trio.ends[0].check()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_who_goes_without_a_word_is_the_cause(rank):
    """As the system does it for a process that was killed: all its connections are closed."""
    with Trio() as trio:
        begin = time.monotonic()
        gone = trio.ends[rank]
        if gone._server is not None:
            gone._server._ending.set()
            gone._server._thread.join()
        gone._stop.set()
        gone._thread.join()
        gone._lines.close()
        for other in (end for end in trio.ends if end is not gone):
            cause = other.wait_for_cause(3)
            assert cause is not None and cause.text.startswith(f"{NAMES[rank]} has gone without a word")
            assert cause.process == NAMES[rank]
        assert time.monotonic() - begin < 1.0


def test_who_leaves_is_no_cause():
    with Trio() as trio:
        trio.ends[0].close()
        time.sleep(0.5)
        trio.ends[2].declare(Cause("later"))
        assert trio.causes()[2] == "later"


def silent(trio: Trio, rank: int) -> None:
    """Its thread sends nothing more and does not read, its connection stays: frozen, or behind a cut link."""
    trio.ends[rank]._stop.set()
    trio.ends[rank]._thread.join()


@pytest.mark.parametrize("rank", [0, 2])
def test_who_is_silent_is_the_cause(rank):
    with Trio(silence_s=2.0) as trio:
        begin = time.monotonic()
        silent(trio, rank)
        other = trio.ends[2 - rank].wait_for_cause(6)
        assert other is not None and f"nothing has been heard of {NAMES[rank]} for 2 s" in other.text
        assert 1.5 < time.monotonic() - begin < 4.5


def test_a_silent_server_is_the_cause():
    with Trio(silence_s=2.0) as trio:
        server = trio.ends[1]._server
        assert server is not None
        server._beat = lambda now: None  # type: ignore[method-assign]
        for rank in (0, 2):
            cause = trio.ends[rank].wait_for_cause(6)
            assert cause is not None and "nothing has been heard of cloud rank 0 for 2 s" in cause.text


def test_how_long_ago_each_site_was_heard():
    with Trio() as trio:
        silent(trio, 0)
        time.sleep(1.5)
        heard = trio.ends[2].last_heard_s()
        assert 1.0 < heard["edge"] < 4.0 and heard["cloud"] < 1.0


GARBAGE = (
    b"GET / HTTP/1.1\r\nHost: cloud\r\n\r\n",
    b"\x00\xff" * 5000,
    b'{"rank": 0, "token": "guessed"}\n',
    b'{"rank": 0, "token": "\\ud800"}\n',
    b'{"rank": 0}\n',
    b'{"rank": "0", "token": 5}\n',
    b'{"rank": 99999999999999999999, "token": ""}\n',
    b"[" * 60000 + b"\n",
    b'{"cause": {"text": "stop, all of you"}}\n',
    b"\n\n\n",
    b"x" * 200_000,
)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_strangers_are_sent_away(garbage, capfd):
    with Trio() as trio, ExitStack() as opened:
        stranger = opened.enter_context(socket.create_connection(("127.0.0.1", trio.port), timeout=13))
        try:
            stranger.sendall(garbage)
            assert stranger.recv(100) == b""
        except ConnectionError:
            pass  # closed while we were still speaking
        assert trio.causes(0.3) == [None] * 3
        trio.ends[0].declare(Cause("a real one"))
        assert trio.causes() == ["a real one"] * 3
    assert "a stranger at" in capfd.readouterr().err


def test_who_has_not_begun_may_be_silent_for_longer():
    """Who builds a model or an index may hold Python's lock; until the first step the limit is `timeout_s`, 5 s here."""
    with Trio(silence_s=2.0, steady=False) as trio:
        silent(trio, 0)
        assert trio.ends[2].wait_for_cause(2.8) is None
        cause = trio.ends[2].wait_for_cause(6)
        assert cause is not None and "nothing has been heard of edge rank 0 for 5 s" in cause.text


def test_who_knocks_again_is_let_in(monkeypatch):
    """A server that sends the first one away, as one does to which too many come at once."""
    sent_away = []
    original = WatchServer._meet

    def once_no(self, stranger):
        if not sent_away:
            sent_away.append(stranger)
            self._drop(stranger.lines.connection)
        else:
            original(self, stranger)

    monkeypatch.setattr(WatchServer, "_meet", once_no)
    with Trio() as trio:
        trio.ends[0].declare(Cause("all three are there"))
        assert sent_away and trio.causes() == ["all three are there"] * 3


def test_a_long_text_is_cut():
    with Trio() as trio:
        trio.ends[0].declare(Cause("x" * 200_000, 0, process=NAMES[0]))
        assert [len(text or "") for text in trio.causes()] == [4000] * 3


def test_many_strangers_who_say_nothing():
    with Trio() as trio, ExitStack() as opened:
        for _ in range(100):
            opened.enter_context(socket.create_connection(("127.0.0.1", trio.port), timeout=3))
        trio.ends[2].declare(Cause("heard all the same"))
        assert trio.causes() == ["heard all the same"] * 3


@pytest.mark.parametrize(
    "message",
    [None, [], {}, {"text": 5}, {"text": "x", "rank": "1"}, {"text": "x", "rank": True}, {"text": "x", "other": 1}],
)
def test_what_is_no_cause(message: Any):
    with pytest.raises(ValueError, match="cause"):
        Cause.from_message(message)
    assert Cause.from_message(Cause("why", 3, 4, "edge rank 1", 5, "F s0 m0", "ValueError").to_message()).index == 4
