"""What is measured over the connection, and how. The edge leads, the cloud answers; both know all of it in the end.

latency    round trips of small messages: a training step's messages wait no less
clock      of the fastest ping, as NTP does it: the cloud's clock is ahead by ((t1 - t0) + (t2 - t3)) / 2, and this is
           wrong by no more than half its round trip
bandwidth  zeros for some seconds, in growing portions; timed where they arrive, from a quarter of the time on, when
           TCP has found its pace
"""

from __future__ import annotations

import math
import socket
import statistics
import time
from dataclasses import dataclass
from typing import Any

from ldt_schedules.comm.probe.meeting import Tell
from ldt_schedules.comm.probe.wire import MAX_BULK_BYTES, Garbage, Gone, Late, Wire
from ldt_schedules.errors import LdtError

_PINGS, _FEWEST_PINGS = 50, 5
_REPLY_S = 20.0
"""For one short message, or an answer to one."""
_PINGS_S = 5.0
"""For all of them, on a slow way."""
_DRAIN_S = 60.0
"""What is still in buffers when the time of a transfer is over may take so much longer."""
_FIRST_PORTION = 1 << 16
_MARKED_BYTES = 1 << 18
MOST_SECONDS = 600.0
"""That one transfer may be asked to last."""
_SLOW_START = 0.25
_LINUX_IP_MTU, _LINUX_IPV6_MTU = 14, 24  # not in the socket module


@dataclass(frozen=True)
class LinkFigures:
    """Times in seconds, rates in bytes a second.

    Attributes:
        rtt_s, rtt_min_s, rtt_p95_s: median, least, and what 19 of 20 pings keep.
        up, down: from the edge to the cloud, and back.
        clock_ahead_s: how far the cloud's clock is ahead of the edge's, give or take `clock_uncertain_s`.
        edge_mtu, edge_mss, cloud_mtu, cloud_mss: bytes of a packet, and of what a TCP segment carries; None where the
            system does not say.
    """

    rtt_s: float
    rtt_min_s: float
    rtt_p95_s: float
    num_pings: int
    up: float
    down: float
    clock_ahead_s: float
    clock_uncertain_s: float
    edge_mtu: int | None
    edge_mss: int | None
    cloud_mtu: int | None
    cloud_mss: int | None


def measure(wire: Wire, seconds: float, tell: Tell) -> LinkFigures:
    """The edge's part, `seconds` for each direction. The cloud then waits for `conclude`.

    Raises:
        LdtError: the cloud went away, or did not keep up.
    """
    try:
        tell("round trips")
        times, ahead = _ping(wire)
        tell(f"bandwidth from the edge to the cloud, {seconds:g} s")
        wire.send({"do": "take"}, _REPLY_S)
        _send_for(wire, seconds)
        up = _number(wire.receive(seconds + _DRAIN_S), "rate")
        tell(f"bandwidth from the cloud to the edge, {seconds:g} s")
        wire.send({"do": "send", "seconds": seconds}, _REPLY_S)
        down = _take(wire)
        wire.send({"do": "sizes"}, _REPLY_S)
        sizes = wire.receive(_REPLY_S)
        edge_mtu, edge_mss = packet_sizes(wire.connection)
        return LinkFigures(
            rtt_s=statistics.median(times),
            rtt_min_s=min(times),
            rtt_p95_s=sorted(times)[math.ceil(0.95 * len(times)) - 1],
            num_pings=len(times),
            up=float(up),
            down=down,
            clock_ahead_s=ahead,
            clock_uncertain_s=min(times) / 2,
            edge_mtu=edge_mtu,
            edge_mss=edge_mss,
            cloud_mtu=_whole(sizes, "mtu"),
            cloud_mss=_whole(sizes, "mss"),
        )
    except (Gone, Late, Garbage) as error:
        raise broken_off("cloud", error) from None


def conclude(wire: Wire, report: dict[str, Any]) -> None:
    """The edge tells the cloud what came of it. Raises LdtError."""
    try:
        wire.send({"do": "end", "report": report}, _REPLY_S)
    except (Gone, Late) as error:
        raise broken_off("cloud", error) from None


def answer(wire: Wire) -> dict[str, Any]:
    """The cloud's part: do what the edge asks until it tells what came of it.

    Raises:
        LdtError: the edge went away, or asks for what this does not do.
    """
    try:
        while True:
            asked = wire.receive(_REPLY_S + _DRAIN_S)
            came = time.time_ns()
            what = asked.get("do")
            if what == "ping":
                wire.send({"came": came, "left": time.time_ns()}, _REPLY_S)
            elif what == "take":
                wire.send({"rate": _take(wire)}, _REPLY_S)
            elif what == "send":
                _send_for(wire, min(MOST_SECONDS, _number(asked, "seconds")))
            elif what == "sizes":
                mtu, mss = packet_sizes(wire.connection)
                wire.send({"mtu": mtu, "mss": mss}, _REPLY_S)
            elif what == "end" and isinstance(asked.get("report"), dict):
                return dict(asked["report"])
            else:
                raise Garbage(f"an unknown request {str(what)[:40]!r}")
    except (Gone, Late, Garbage) as error:
        raise broken_off("edge", error) from None


def packet_sizes(connection: socket.socket) -> tuple[int | None, int | None]:
    """`(MTU, MSS)` of a connection, as far as the system knows them."""
    mtu = (
        _option(connection, socket.IPPROTO_IPV6, getattr(socket, "IPV6_MTU", _LINUX_IPV6_MTU))
        if connection.family == socket.AF_INET6 and not _is_mapped(connection)
        else _option(connection, socket.IPPROTO_IP, getattr(socket, "IP_MTU", _LINUX_IP_MTU))
    )
    return mtu, _option(connection, socket.IPPROTO_TCP, getattr(socket, "TCP_MAXSEG", None))


def _is_mapped(connection: socket.socket) -> bool:
    return str(connection.getpeername()[0]).startswith("::ffff:")


def _option(connection: socket.socket, level: int, name: int | None) -> int | None:
    if name is None:
        return None
    try:
        return connection.getsockopt(level, name) or None
    except OSError:
        return None


def _ping(wire: Wire) -> tuple[list[float], float]:
    """The round trips, and how far the other clock is ahead by the fastest of them."""
    times: list[float] = []
    ahead, until = 0.0, time.monotonic() + _PINGS_S
    while len(times) < _PINGS and (len(times) < _FEWEST_PINGS or time.monotonic() < until):
        left, begun = time.time_ns(), time.perf_counter()
        wire.send({"do": "ping"}, _REPLY_S)
        there = wire.receive(_REPLY_S)
        took, back = time.perf_counter() - begun, time.time_ns()
        came, sent = (int(_number(there, name)) for name in ("came", "left"))
        took = max(1e-7, took - max(0, sent - came) / 1e9)
        if not times or took < min(times):
            ahead = ((came - left) + (sent - back)) / 2e9
        times.append(took)
    return times, ahead


def _send_for(wire: Wire, seconds: float) -> None:
    """Zeros until the time is over, in portions that grow while the way takes them at once; a portion of 0 is the end."""
    end, portion = time.monotonic() + seconds, _FIRST_PORTION
    while time.monotonic() < end:
        begun = time.monotonic()
        wire.send({"bulk": portion}, seconds + _DRAIN_S)
        wire.send_zeros(portion, seconds + _DRAIN_S)
        if time.monotonic() - begun < 0.05:
            portion = min(2 * portion, MAX_BULK_BYTES)
    wire.send({"bulk": 0}, seconds + _DRAIN_S)


def _take(wire: Wire) -> float:
    """Count what comes until the end. Bytes a second, once TCP has found its pace."""
    latest = time.monotonic() + MOST_SECONDS + _DRAIN_S
    begun, total, marks = 0.0, 0, [(0.0, 0)]
    while portion := int(_number(wire.receive(_DRAIN_S), "bulk")):
        if not 0 < portion <= MAX_BULK_BYTES:
            raise Garbage(f"a portion of {portion} bytes")
        begun = begun or time.perf_counter()
        while portion:
            if time.monotonic() > latest:
                raise Late("a transfer without an end")
            taken = min(portion, _MARKED_BYTES)
            wire.receive_bulk(taken, _DRAIN_S)
            portion, total = portion - taken, total + taken
            marks.append((time.perf_counter() - begun, total))
    return _rate(marks)


def _rate(marks: list[tuple[float, int]]) -> float:
    """Bytes a second between the mark at a quarter of the time and the last; `marks` are seconds and bytes so far."""
    last, counted = marks[-1]
    since, before = next(mark for mark in marks if mark[0] >= _SLOW_START * last)
    if counted == before:  # all of it came at once
        since, before = 0.0, 0
    return (counted - before) / max(last - since, 1e-9)


def _number(message: dict[str, Any], name: str) -> float:
    value = message.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise Garbage(f"{name} is no number: {str(value)[:40]!r}")
    return value


def _whole(message: dict[str, Any], name: str) -> int | None:
    return None if message.get(name) is None else int(_number(message, name))


def broken_off(site: str, error: Exception) -> LdtError:
    """The other site, `site`, did not do its part."""
    return LdtError(
        f"the measurement broke off: {error}; look at what ldt doctor says at the {site}, and whether the way between the "
        "sites holds"
    )
