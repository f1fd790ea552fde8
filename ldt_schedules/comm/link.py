"""The link: what joins the two sites, and is part of neither site's torch.distributed world.

One TCPStore (a process of the cloud listens, so the edge needs no open port for it) and, built on it, one raw
process group for each lane over all processes of both sites, plus one for scalars. The groups are made by everybody,
all at once, in one order: groups made lazily, by whoever needs them first, deadlock.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ldt_schedules import device
from ldt_schedules.comm.cause import Cause
from ldt_schedules.comm.flight_recorder import FlightRecorder
from ldt_schedules.comm.gate import Gate
from ldt_schedules.comm.watch import Members, Watch
from ldt_schedules.errors import ConfigError, LinkError
from ldt_schedules.planning.channels import Lane

_POLL_S = 0.02
_BACKENDS = ("gloo", "nccl", "hccl")


@dataclass
class Channel:
    """One lane: a process group of its own and a stream of its own, apart from the compute stream."""

    group: Any
    stream: Any
    backend: str


@dataclass
class Link:
    """One process's end of the link.

    Attributes:
        store: the sites' shared key-value store (small control messages).
        channels: a `Channel` for each lane.
        scalars: a gloo group over all processes of both sites, for `sum_over_sites`.
        timeout_s: the deadline of every wait.
        watch: where a failure anywhere is seen.
        flight: what this process is at.
        gate: through which goes what leaves the site; None on a link that joins no sites.
    """

    global_rank: int
    total_processes: int
    store: Any
    channels: dict[Lane, Channel]
    scalars: Any
    timeout_s: float
    watch: Watch
    flight: FlightRecorder = field(default_factory=FlightRecorder)
    gate: Gate | None = None

    def sum_over_sites(self, contribution: torch.Tensor, what: str = "the other processes") -> torch.Tensor:
        """Sum of `contribution` (float64, on the CPU, any shape) over every process of both sites.

        Every process must call this equally often: it is the one collective that crosses the link.

        Args:
            what: is added up; for those who ask what a process waits for.
        """
        total = contribution.detach().to(device="cpu", dtype=torch.float64).clone()
        if self.gate is not None:
            self.gate.add_scalars(total, what)
        try:
            with self.flight.waiting(what):
                self.scalars.allreduce([total]).wait()
        except RuntimeError as error:
            raise LinkError(f"the sites could not add up {what} within {self.timeout_s:g} s: {error}") from error
        return total

    def publish(self, key: str, message: dict[str, Any]) -> None:
        """Leave a small message for other processes; `fetch` blocks until it is there.

        Args:
            key: begins with the message's name, as `declared.MESSAGES` has it, and a slash.

        Raises:
            ResidencyError: it is to cross to the other site and is not declared.
        """
        what = key.partition("/")[0]
        self.store.set(key, json.dumps(message) if self.gate is None else self.gate.send_message(what, message))

    def fetch(self, key: str, what: str) -> dict[str, Any]:
        """Read a message, waiting for it up to the deadline.

        Raises:
            LdtError: nobody published it in time; `what` says what was awaited.
        """
        try:
            with self.flight.waiting(what):
                text = self.store.get(key)
        except dist.DistStoreError as error:
            raise LinkError(f"waited {self.timeout_s:g} s for {what}: the other site did not send it") from error
        if self.gate is None:
            return json.loads(text)  # type: ignore[no-any-return]
        return self.gate.receive_message(key.partition("/")[0], text)  # type: ignore[no-any-return]

    def forget(self, key: str) -> None:
        """Remove a message that everybody has read."""
        self.store.delete_key(key)

    def wait_for_all(self) -> None:
        """Return when every process of both sites has called this."""
        self.sum_over_sites(torch.zeros(1))

    def close(self, abandon: bool = False) -> None:
        """Give the groups and the store back now: left to the end of the process, their threads may outlive what they use."""
        self.channels.clear()
        self.scalars = None
        self.watch.close(abandon)  # who serves the store stays until the others have left
        self.store = None


def connect(
    *,
    host: str,
    port: int,
    listen: bool,
    global_rank: int,
    total_processes: int,
    timeout_s: float,
    backend: str = "auto",
    name: str = "ldt",
    members: Members | None = None,
    silence_s: float = 0.0,
    flight: FlightRecorder | None = None,
    gate: Gate | None = None,
    on_cause: Callable[[Cause], None] = lambda cause: None,
    on_turn: Callable[[dict[str, float]], None] = lambda heard: None,
) -> Link:
    """Join the link. Called once by every process of both sites; returns when all are there.

    Args:
        host, port: where the store listens.
        listen: is it this process that listens there?
        members: names of all processes; default: by their rank, the first serves the watch.
        silence_s, on_cause, on_turn: see `comm.watch.Watch`.
        flight: of this process, if it has one already.
        gate: of a link that joins sites.
        timeout_s: deadline of every wait on the link, this one included.
        backend: of the lanes: `auto` (the device's own), `gloo` (through host memory: sites of different devices),
            `nccl` or `hccl`.

    Raises:
        ConfigError: the sites count different numbers of processes, or two claim to be the same one.
        LdtError: the others did not come in time, or the port cannot be opened.
    """
    members = members or unnamed_members(total_processes)
    chosen = device.collective_backend() if backend == "auto" else backend
    if chosen not in _BACKENDS:
        raise ConfigError(f"link.backend is {backend!r}; allowed are auto, {', '.join(_BACKENDS)}")
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(
            host_name=host, port=port, is_master=listen, timeout=timeout, wait_for_workers=False, use_libuv=True
        )
        rank, size = global_rank, total_processes
        _meet(dist.PrefixStore(f"{name}/meeting", store), rank, members.names, timeout_s)
        watch = Watch(
            dist.PrefixStore(f"{name}/watch", store), host, rank, members, silence_s, timeout_s, on_cause, on_turn
        )
        channels = {
            lane: Channel(
                _raw_group(chosen, store, f"{name}/{lane.name}", rank, size, timeout), device.new_stream(), chosen
            )
            for lane in Lane
        }
        scalars = _raw_group("gloo", store, f"{name}/scalars", rank, size, timeout)
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        raise LinkError(
            f"could not join the link at {host}:{port} within {timeout_s:g} s as process {global_rank} of "
            f"{total_processes} ({error}); are all processes of both sites started with the same link.address?"
        ) from error
    control = dist.PrefixStore(f"{name}/control", store)
    return Link(rank, size, control, channels, scalars, timeout_s, watch, flight or FlightRecorder(), gate)


def unnamed_members(count: int) -> Members:
    """Of a link without sites."""
    return Members([f"rank {rank}" for rank in range(count)], [""] * count, server=0)


def _meet(store: Any, rank: int, names: Sequence[str], timeout_s: float) -> None:
    """Return when every process of both sites is here, each of them once.

    The first to come says how many there are. Groups of unequal sizes would wait for each other until the deadline.

    Raises:
        ConfigError: the sites were started for different numbers of processes, or a process is there twice.
        TimeoutError: some did not come in time.
    """
    first = int(store.compare_set("size", "", str(len(names))))
    if first != len(names):
        store.set("refused", f"one site was started for {first} processes in all and the other for {len(names)}")
    me = f"{names[rank]} on {socket.gethostname()} (pid {os.getpid()})"
    other = store.compare_set(f"claim/{rank}", "", me).decode()
    if other != me and not store.check(["refused"]):
        store.set("refused", f"two processes claim to be process {rank} of the run: {other} and {me}")
    here, deadline = store.add("here", 1), time.monotonic() + timeout_s
    while here < first and not store.check(["refused"]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{here} of {first} processes came; {_missing(store, names)} did not")
        time.sleep(_POLL_S)
        here = store.add("here", 0)
    if store.check(["refused"]):
        why = store.get("refused").decode()
        time.sleep(_POLL_S * 50)  # the process that holds the store stays until the others have read it too
        raise ConfigError(f"{why}; give both sites the same parallel sizes, and start each process once")


def _missing(store: Any, names: Sequence[str]) -> str:
    return ", ".join(name for rank, name in enumerate(names) if not store.check([f"claim/{rank}"])) or "one of them"


def _raw_group(backend: str, store: Any, prefix: str, rank: int, size: int, timeout: timedelta) -> Any:
    """A process group that no torch.distributed world knows of."""
    prefixed = dist.PrefixStore(prefix, store)
    if backend == "gloo":
        return dist.ProcessGroupGloo(prefixed, rank, size, timeout)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(prefixed, rank, size, options)
    else:
        import torch_npu  # noqa: F401 - registers ProcessGroupHCCL

        group = torch._C._distributed_c10d.ProcessGroupHCCL(prefixed, rank, size, timeout)  # type: ignore[attr-defined]
    _warm_up(group)
    return group


def _warm_up(group: Any) -> None:
    """Make the communicator now: one made at first use, in an order that differs between ranks, deadlocks."""
    group.allreduce([torch.zeros(1, device=device.current_device())]).wait()
