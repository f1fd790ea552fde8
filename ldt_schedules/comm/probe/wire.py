"""Messages over one TCP connection: JSON objects, each behind its length, and bulk of zeros behind a message.

    | 4 bytes, length n | n bytes of JSON |

The other end may be anybody. So a length has a limit, what is no object is refused, and every wait has a deadline: one
for a whole message, so that nobody holds us up by sending a byte now and then.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from types import TracebackType
from typing import Any

MAX_MESSAGE_BYTES = 1 << 20
MAX_BULK_BYTES = 1 << 23
_LENGTH = struct.Struct(">I")
_ZEROS = memoryview(bytes(MAX_BULK_BYTES))


class Gone(Exception):
    """The other end has closed the connection, or the way to it is cut."""


class Late(Exception):
    """It did not come, or could not be sent, in time."""


class Garbage(Exception):
    """What came is no message of ours."""


class Wire:
    """One end of a connection."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self.connection = connection
        self.peer = peer
        self._scratch = bytearray(1 << 18)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()

    def send(self, message: dict[str, Any], within_s: float) -> None:
        """Raises Gone or Late."""
        body = json.dumps(message).encode()
        assert len(body) <= MAX_MESSAGE_BYTES, len(body)
        self._send_all(memoryview(_LENGTH.pack(len(body)) + body), time.monotonic() + within_s)

    def receive(self, within_s: float) -> dict[str, Any]:
        """The next message, as a whole. Raises Gone, Late or Garbage."""
        deadline = time.monotonic() + within_s
        (length,) = _LENGTH.unpack(self._receive_exactly(_LENGTH.size, deadline))
        if length > MAX_MESSAGE_BYTES:
            raise Garbage(f"a message of {length} bytes, where {MAX_MESSAGE_BYTES} are allowed")
        try:
            message = _printable(json.loads(self._receive_exactly(length, deadline)))
        except (ValueError, RecursionError):
            raise Garbage("no JSON") from None
        if not isinstance(message, dict):
            raise Garbage("JSON, but no object")
        return message

    def send_zeros(self, count: int, within_s: float) -> None:
        """Bulk, at most `MAX_BULK_BYTES`. Raises Gone or Late."""
        self._send_all(_ZEROS[:count], time.monotonic() + within_s)

    def receive_bulk(self, count: int, within_s: float) -> None:
        """Read `count` bytes and forget them. Raises Gone or Late."""
        deadline = time.monotonic() + within_s
        while count:
            view = memoryview(self._scratch)[: min(count, len(self._scratch))]
            count -= self._receive_some(view, deadline)

    def _send_all(self, data: memoryview, deadline: float) -> None:
        while data:
            self._wait_at_most(deadline)
            try:
                data = data[self.connection.send(data) :]
            except TimeoutError:
                raise Late("the other end did not take what was sent") from None
            except OSError as error:
                raise Gone(error.strerror or str(error)) from None

    def _receive_exactly(self, count: int, deadline: float) -> bytes:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            view = view[self._receive_some(view, deadline) :]
        return bytes(data)

    def _receive_some(self, view: memoryview, deadline: float) -> int:
        self._wait_at_most(deadline)
        try:
            count = self.connection.recv_into(view)
        except TimeoutError:
            raise Late("nothing came") from None
        except OSError as error:
            raise Gone(error.strerror or str(error)) from None
        if not count:
            raise Gone("the connection was closed")
        return count

    def _wait_at_most(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Late("the time is over")
        self.connection.settimeout(left)


def _printable(value: Any) -> Any:
    """Texts without control characters: they may end on somebody's terminal, which obeys them."""
    if isinstance(value, str):
        return "".join(char if char.isprintable() else "?" for char in value)
    if isinstance(value, list):
        return [_printable(one) for one in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(one) for key, one in value.items()}
    return value
