"""How the two ends of a probe find each other: the cloud listens, the edge tries until it answers.

Every way in which they may miss each other has a message of its own, because each has another remedy: a name that nobody
knows, a machine without a listener, a firewall that swallows packets, no route, somebody else at the port.

A stranger at the cloud's port has a few seconds to say hello; then he is sent away and waiting goes on.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections.abc import Callable
from typing import Any

from ldt_schedules.comm.probe.wire import Garbage, Gone, Late, Wire
from ldt_schedules.errors import ConfigError, LdtError

FORMAT = "ldt-doctor/1"
HELLO_S = 5.0
"""How long one who connects may take for his hello."""
_ATTEMPT_S = 5.0
_PAUSE_S = 0.5
_NO_ROUTE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}

Tell = Callable[[str], None]
"""Called with what is awaited, each time it changes."""


class NotYet(Exception):
    """One attempt failed. The text says how, and what to do if it stays so."""


def open_port(host: str, port: int) -> socket.socket:
    """Listen at `port`: of this machine alone where `host` is a loopback address, else of all its addresses, since a name
    that the edge reaches may be no address of this machine (a NAT).

    Raises:
        ConfigError: the port is in use, or is not for this user.
    """
    try:
        if is_loopback(host):
            return socket.create_server((_loopback_of(host), port), family=_family(host))
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} (link.address) is in use on this machine: a run, or another ldt doctor, listens there; end "
                "it, or give both sites another port"
            ) from None
        raise ConfigError(f"cannot listen at port {port} (link.address): {error.strerror or error}") from None


def listen(server: socket.socket, hello: dict[str, Any], wait_s: float, tell: Tell) -> tuple[Wire, dict[str, Any]]:
    """Wait for the edge. Returns the connection and the edge's hello.

    Raises:
        LdtError: nobody came in time.
    """
    deadline = time.monotonic() + wait_s
    port, strangers = server.getsockname()[1], ""
    while (left := deadline - time.monotonic()) > 0:
        tell(f"waiting at port {port} for the edge, at most {wait_s:g} s{strangers}")
        server.settimeout(left)
        try:
            connection, address = server.accept()
        except TimeoutError:
            break
        except OSError:
            continue  # he has gone before he was let in
        wire = Wire(connection, str(address[0]).removeprefix("::ffff:"))
        try:
            return wire, _greet(wire, hello, min(HELLO_S, max(0.1, deadline - time.monotonic())))
        except (NotYet, Gone, Late) as error:
            wire.close()
            strangers = f" (sent away {wire.peer}: {error})"
    raise LdtError(
        f"nobody came to port {port} within {wait_s:g} s{strangers}. Start the edge at the same time: ldt doctor CONFIG "
        "--site edge, with the same link.address. If it is running and cannot connect, its own message says where it "
        "fails; usually this machine's firewall does not let the port in"
    )


def _greet(wire: Wire, hello: dict[str, Any], within_s: float) -> dict[str, Any]:
    """Read an edge's hello and answer it. Raises NotYet for a stranger's."""
    try:
        theirs = wire.receive(within_s)
    except Garbage as error:
        raise NotYet(f"it sent {error}") from None
    why = _why_not(theirs, "edge")
    wire.send({"format": FORMAT, "refused": why} if why else hello, within_s)
    if why:
        raise NotYet(why)
    return theirs


def connect(host: str, port: int, hello: dict[str, Any], wait_s: float, tell: Tell) -> tuple[Wire, dict[str, Any]]:
    """Reach the cloud, trying until it answers. Returns the connection and the cloud's hello.

    Raises:
        ConfigError: nobody knows the name, or the cloud refused us.
        LdtError: nobody answered in time, with what happened instead and what to do.
    """
    deadline, attempts, last = time.monotonic() + wait_s, 0, "no attempt was made"
    while (left := deadline - time.monotonic()) > 0:
        attempts += 1
        try:
            wire = _attempt(host, port, min(_ATTEMPT_S, left))
            try:
                return wire, _introduce(wire, hello, min(2 * HELLO_S, max(0.1, deadline - time.monotonic())))
            except BaseException:
                wire.close()
                raise
        except NotYet as error:
            last = str(error)
        tell(f"trying {host}:{port} for at most {wait_s:g} s: {last.partition(';')[0]}")
        time.sleep(max(0.0, min(_PAUSE_S, deadline - time.monotonic())))
    raise LdtError(f"the cloud was not reached at {host}:{port} in {wait_s:g} s ({attempts} attempts): {last}")


def _attempt(host: str, port: int, within_s: float) -> Wire:
    """Connect once. Raises NotYet, or ConfigError for a name that nobody knows."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
            raise NotYet(f"the name {host} cannot be looked up now; is this machine's name server reachable?") from None
        raise ConfigError(
            f"link.address: nobody knows the name {host!r} ({getattr(error, 'strerror', None) or error}); give the "
            "name or address of the cloud's first machine as this machine reaches it"
        ) from None
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(within_s / len(found))
        try:
            connection.connect(address)
            return Wire(connection, str(address[0]))
        except OSError as error:
            connection.close()
            failure = error
    assert failure is not None
    raise NotYet(_why_unreached(failure, host, port)) from None


def _why_unreached(error: OSError, host: str, port: int) -> str:
    if isinstance(error, ConnectionRefusedError):
        return (
            f"refused: {host} answers, but nobody listens at port {port}; start ldt doctor CONFIG --site cloud on that "
            "machine, with the same link.address (a firewall that rejects looks alike)"
        )
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return (
            f"no answer at all; a firewall that drops packets, or an address that is not in use. Let TCP port {port} in "
            f"at the cloud, and look whether this machine may open connections to it"
        )
    if error.errno in _NO_ROUTE:
        return f"no route to {host} ({error.strerror}); is the VPN up, and is the address that of the cloud?"
    return f"{error.strerror or error}; look at the address and the way to it"


def _introduce(wire: Wire, hello: dict[str, Any], within_s: float) -> dict[str, Any]:
    """Say hello and read the answer. Raises NotYet where no doctor answers, ConfigError where one refuses."""
    somebody = "; is a run, or something else, at this port? Start ldt doctor CONFIG --site cloud there"
    try:
        wire.send(hello, within_s)
        theirs = wire.receive(within_s)
    except Garbage as error:
        raise NotYet(f"{wire.peer} answers, but not as ldt doctor does (it sent {error}){somebody}") from None
    except (Gone, Late) as error:
        raise NotYet(f"{wire.peer} takes the connection, but does not answer ({error}){somebody}") from None
    refused = theirs.get("refused")
    why = _why_not(theirs, "cloud") if refused is None else str(refused)[:500]
    if why:
        raise ConfigError(f"the ldt doctor at {wire.peer} does not go with this one: {why}")
    return theirs


def _why_not(hello: dict[str, Any], site: str) -> str | None:
    """Why these two do not belong together."""
    if hello.get("format") != FORMAT:
        return (
            f"one speaks {FORMAT}, the other {str(hello.get('format'))[:40]!r}; install the same ldt-schedules on both"
        )
    if hello.get("site") != site:
        return f"it says that it is the {str(hello.get('site'))[:20]}; start one site as edge and one as cloud"
    return None


def is_loopback(host: str) -> bool:
    """Does the name stand for this machine alone?"""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _loopback_of(host: str) -> str:
    return "127.0.0.1" if host == "localhost" else host


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
