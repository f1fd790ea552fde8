"""Messages of any shape between pipeline ranks: each says in a header what follows.

A send is posted at once, header and payload. A receive posts the header; a thread looks which headers have come, makes room
and posts the payloads, so that they travel while the stages compute:

    post_recv ──► header posted ──► [thread] header there ─► checked ─► payload posted ─► there ──► wait (at first use)

Nobody waits inside gloo for a message that may never come: such a wait cannot be broken off, and a thread in it takes the
whole process down when the interpreter ends. So every header and payload ends with a mark, the thread looks for it in
memory, and the process waits for the thread alone, looking for the cause of an abort meanwhile.

Headers go over the link's gloo group for control, where tags keep them apart. The payloads of one pair of ranks on one lane
are received in the order in which they were sent, so that a backend without tags will do.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from ldt_schedules import device
from ldt_schedules.comm.cause import Aborted, Cause
from ldt_schedules.comm.link import Link
from ldt_schedules.comm.message_header import MessageHeader, Specs
from ldt_schedules.comm.message_payload import packed, room_for, unpacked
from ldt_schedules.comm.message_pump import Pump
from ldt_schedules.comm.torch_transport import ProcessTransport
from ldt_schedules.comm.traffic import Traffic
from ldt_schedules.errors import LdtError
from ldt_schedules.planning.channels import Lane
from ldt_schedules.planning.dependencies import What
from ldt_schedules.planning.progress import Semantics

_SOONEST_S, _LATEST_S, _SHARE = 0.0002, 0.005, 0.1
"""How long one who waits does not look: a tenth of what he has waited, within limits. Others may need the core."""
_GRACE_S = 1.0

Expected = Callable[[], "Specs | None"]
"""The shapes that are due, asked when the header is there; None where any will do."""


@dataclass
class MessageTransport:
    """The transport of one process, whose pipeline rank is its rank on the link; a `comm.transport.Transport`.

    Contents are None, a tensor, or a tuple of tensors and None.

    Attributes:
        iteration: of the step that runs; part of every header.
        pump: looks after the receives.
    """

    link: Link
    iteration: int = 0
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        self.pump = Pump()
        self._meetings = 0
        self._closed = False
        self._processes = ProcessTransport(self.link)
        # A thread that is still in C++ when the interpreter ends takes the process down with SIGABRT.
        atexit.register(self._at_exit)

    def __enter__(self) -> MessageTransport:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Close; an error that nobody has told the others of is told."""
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            rank = self.link.global_rank
            self.link.watch.declare(Cause(f"rank {rank}: {type(error).__name__}: {error}", rank))
        self.close()

    def post_send(self, content: Any, spec: Any, /, *, what: What, peer: int, lane: Lane, tag: int) -> _Sending:
        """Start sending. What is sent is kept until it has gone; it describes itself, so that `spec` says nothing new."""
        self.link.watch.check()
        header = MessageHeader.of(content, self.iteration, tag)
        message = header.encoded()
        works: list[Any] = [_Work(self.link.scalars.send([message], peer, tag), message, self.link.timeout_s)]
        if header.num_bytes:
            payload = packed(content, header)
            self.traffic.sent[peer] += header.num_bytes
            name = f"pipeline rank {peer}"
            works.append(self._processes.post_send(payload, peer, lane=lane, tag=tag, what=name))
        return _Sending(self, works, f"sending message {tag} to rank {peer}")

    def post_recv(self, expected: Expected, /, *, what: What, peer: int, lane: Lane, tag: int) -> _Receiving:
        """Start receiving."""
        self.link.watch.check()
        iteration, message = self.iteration, MessageHeader.room()
        work = _Work(self.link.scalars.recv([message], peer, tag), message, self.link.timeout_s)

        def payload() -> tuple[Any, torch.Tensor, Callable[[], Any]]:
            """The header is there: what is still to come, where to, and what it will make."""
            header = MessageHeader.decoded(message)
            header.require(iteration, tag, expected())
            buffer = room_for(header, self._processes, lane)
            if header.num_bytes == 0:
                return None, buffer, lambda: unpacked(buffer, header)
            self.traffic.received[peer] += header.num_bytes
            name = f"pipeline rank {peer}"
            posted = self._processes.post_recv(buffer, peer, lane=lane, tag=tag, what=name)
            return posted, buffer, lambda: unpacked(buffer, header)

        future = self.pump.expect((peer, lane), work, message, payload)
        return _Receiving(self, future, lane, f"receiving message {tag} from rank {peer}")

    @property
    def semantics(self) -> Semantics:
        """How its messages pass: gloo matches them by tag, a communicator of an accelerator works in order."""
        by_tag = all(channel.backend == "gloo" for channel in self.link.channels.values())
        return Semantics.BUFFERED if by_tag else Semantics.RENDEZVOUS

    def wait_until(self, done: Callable[[], bool], what: str) -> None:
        """Look again and again, and for the cause of an abort meanwhile.

        Raises:
            Aborted: somebody has failed.
            LdtError: it took longer than the link's deadline.
        """
        begin = time.monotonic()
        while not done():
            self.link.watch.check()
            waited = time.monotonic() - begin
            if waited > self.link.timeout_s:
                raise LdtError(f"waited {self.link.timeout_s:g} s for {what}")
            time.sleep(min(max(_SHARE * waited, _SOONEST_S), _LATEST_S))

    def fetch(self, key: str, what: str) -> dict[str, Any]:
        """A message that another rank leaves with `link.publish`. Raises as `wait_until` does."""
        self.wait_until(lambda: bool(self.link.store.check([key])), what)
        return self.link.fetch(key, what)

    def told_by_first(self, mine: dict[str, Any], what: str) -> dict[str, Any]:
        """Rank 0's message, on every rank. All must call this, and `wait_for_all`, equally often and in one order.

        Raises as `wait_until` does.
        """
        key = f"first/{self._meetings}"
        if self.link.global_rank == 0:
            self.link.publish(key, mine)
        return self.fetch(key, f"rank 0's {what}")

    def wait_for_all(self) -> None:
        """Return when every rank has called this as often. Raises as `wait_until` does."""
        self._meetings += 1
        key, store = f"meeting/{self._meetings}", self.link.store
        store.add(key, 1)
        self.wait_until(lambda: bool(store.add(key, 0) >= self.link.total_processes), "the other ranks")

    def consequence(self, what: str, error: Exception) -> LdtError:
        """The error to raise for one of the link's: a lost connection is seldom the beginning."""
        cause = self.link.watch.wait_for_cause(_GRACE_S)
        return Aborted(cause) if cause is not None else LdtError(f"{what} failed: {error}")

    def close(self) -> None:
        """Give the link back, so that those who wait for this rank see it go. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self.pump.end()
        self.link.close()

    def _at_exit(self) -> None:
        """The user has not closed: perhaps because of an error of his own, which the interpreter has just printed."""
        self.__exit__(None, getattr(sys, "last_exc", None) or getattr(sys, "last_value", None), None)


@dataclass
class _Sending:
    transport: MessageTransport
    works: list[Any]
    what: str

    def is_complete(self) -> bool:
        return all(work.is_complete() for work in self.works)

    def wait(self) -> None:
        """Who comes here has posted all of its receives before, so that the circle of those who wait is never closed."""
        try:
            for work in self.works:
                work.wait()
        except Exception as error:
            raise self.transport.consequence(self.what, error) from error


@dataclass
class _Receiving:
    transport: MessageTransport
    future: Future[Any]
    lane: Lane
    what: str

    def wait(self) -> Any:
        self.transport.wait_until(self._is_there, self.what)
        try:
            content = self.future.result()
        except LdtError:
            raise
        except Exception as error:
            raise self.transport.consequence(self.what, error) from error
        device.wait_for_stream(self.transport.link.channels[self.lane].stream)
        return content

    def _is_there(self) -> bool:
        """Who waits looks himself, and sooner than the thread."""
        while not self.future.done():
            if not self.transport.pump.look():
                return self.future.done()
        return True


@dataclass
class _Work:
    """A header under way; keeps its bytes."""

    work: Any
    message: torch.Tensor
    timeout_s: float

    def is_complete(self) -> bool:
        return bool(self.work.is_completed())

    def wait(self) -> None:
        self.work.wait(timedelta(seconds=self.timeout_s))
