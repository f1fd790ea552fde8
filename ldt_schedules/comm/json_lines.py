"""Messages of the watch: JSON objects, one a line, over a TCP connection.

Read from whoever connects, so nothing here trusts them: a line has a greatest length, and what is no object is refused.
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

MAX_LINE_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 14


class Garbage(ValueError):
    """What came is no message."""


class JsonLines:
    """One end of a connection. `send` may be called from several threads, one message at a time is theirs to see to."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self.connection = connection
        self._timeout_s = timeout_s
        self._received = b""
        connection.settimeout(timeout_s)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: dict[str, Any]) -> bool:
        """Has it gone? Small messages always fit into the system's buffer, so that nobody waits here for a slow link."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come since, after the system said that something has; None: the other end has gone.

        Raises:
            Garbage: that is no message.
        """
        try:
            chunk = self.connection.recv(_CHUNK_BYTES)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not chunk:
            return None
        *lines, self._received = (self._received + chunk).split(b"\n")
        if len(self._received) > MAX_LINE_BYTES:
            raise Garbage(f"a line of more than {MAX_LINE_BYTES} bytes")
        return [_message(line) for line in lines]

    def wake(self) -> None:
        """Let a thread that waits for this connection see its end now."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Garbage(str(error)) from None
    if not isinstance(message, dict):
        raise Garbage("not an object")
    return message
