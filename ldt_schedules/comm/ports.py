"""Free TCP ports of this machine, for stores that children or other processes are about to open."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

from ldt_schedules.errors import LdtError

_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_EPHEMERAL = (32768, 60999)
_LOWEST_PORT, _HIGHEST_PORT = 10_000, 65_000


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports that nobody uses now.

    A port that the kernel hands out itself (bind to 0) comes from the range of outgoing connections, and may be taken
    again by any of those before the child listens. So ports are drawn from outside that range, and all are held at
    once, so that they differ.

    Raises:
        LdtError: no free port was found.
    """
    low, high = _ephemeral_range()
    outside = [port for port in range(_LOWEST_PORT, _HIGHEST_PORT) if not low <= port <= high]
    chosen: list[int] = []
    with ExitStack() as held:
        for port in random.SystemRandom().sample(outside, min(len(outside), 200 + count)):
            if len(chosen) == count:
                break
            listener = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                listener.bind(("", port))
            except OSError:
                continue
            chosen.append(port)
    if len(chosen) < count:
        raise LdtError(f"found only {len(chosen)} of {count} free TCP ports between {_LOWEST_PORT} and {_HIGHEST_PORT}")
    return chosen


def _ephemeral_range() -> tuple[int, int]:
    try:
        low, high = _EPHEMERAL_RANGE.read_text().split()
        return (int(low), int(high)) if int(low) > _LOWEST_PORT + 1000 else _USUAL_EPHEMERAL
    except (OSError, ValueError):
        return _USUAL_EPHEMERAL
