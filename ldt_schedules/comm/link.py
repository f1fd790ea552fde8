"""The link: what joins the two sites, and is part of neither site's torch.distributed world.

One TCPStore (a process of the cloud listens, so the edge needs no open port for it) and, built on it, one raw
process group for each lane over all processes of both sites, plus one for scalars. The groups are made by everybody,
all at once, in one order: groups made lazily, by whoever needs them first, deadlock.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ldt_schedules import device
from ldt_schedules.errors import ConfigError, LdtError
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
    """

    global_rank: int
    total_processes: int
    store: Any
    channels: dict[Lane, Channel]
    scalars: Any
    timeout_s: float

    def sum_over_sites(self, contribution: torch.Tensor) -> torch.Tensor:
        """Sum of `contribution` (float64, on the CPU, any shape) over every process of both sites.

        Every process must call this equally often: it is the one collective that crosses the link.
        """
        total = contribution.detach().to(device="cpu", dtype=torch.float64).clone()
        try:
            self.scalars.allreduce([total]).wait()
        except RuntimeError as error:
            raise LdtError(f"the sites could not add up their numbers within {self.timeout_s:g} s: {error}") from error
        return total

    def publish(self, key: str, message: dict[str, Any]) -> None:
        """Leave a small message for other processes; `fetch` blocks until it is there."""
        self.store.set(key, json.dumps(message))

    def fetch(self, key: str, what: str) -> dict[str, Any]:
        """Read a message, waiting for it up to the deadline.

        Raises:
            LdtError: nobody published it in time; `what` says what was awaited.
        """
        try:
            return json.loads(self.store.get(key))  # type: ignore[no-any-return]
        except dist.DistStoreError as error:
            raise LdtError(f"waited {self.timeout_s:g} s for {what}: the other site did not send it") from error

    def forget(self, key: str) -> None:
        """Remove a message that everybody has read."""
        self.store.delete_key(key)

    def wait_for_all(self) -> None:
        """Return when every process of both sites has called this."""
        self.sum_over_sites(torch.zeros(1))

    def close(self) -> None:
        """Give the groups and the store back now: left to the end of the process, their threads may outlive what they use."""
        self.channels.clear()
        self.scalars = self.store = None


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
) -> Link:
    """Join the link. Called once by every process of both sites; returns when all are there.

    Args:
        host, port: where the store listens.
        listen: is it this process that listens there?
        timeout_s: deadline of every wait on the link, this one included.
        backend: of the lanes: `auto` (the device's own), `gloo` (through host memory: sites of different devices),
            `nccl` or `hccl`.

    Raises:
        ConfigError: the sites count different numbers of processes.
        LdtError: the others did not come in time, or the port cannot be opened.
    """
    chosen = device.collective_backend() if backend == "auto" else backend
    if chosen not in _BACKENDS:
        raise ConfigError(f"link.backend is {backend!r}; allowed are auto, {', '.join(_BACKENDS)}")
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(
            host_name=host, port=port, is_master=listen, timeout=timeout, wait_for_workers=False, use_libuv=True
        )
        rank, size = global_rank, total_processes
        _meet(dist.PrefixStore(f"{name}/meeting", store), size, timeout_s)
        channels = {
            lane: Channel(
                _raw_group(chosen, store, f"{name}/{lane.name}", rank, size, timeout), device.new_stream(), chosen
            )
            for lane in Lane
        }
        scalars = _raw_group("gloo", store, f"{name}/scalars", rank, size, timeout)
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        raise LdtError(
            f"could not join the link at {host}:{port} within {timeout_s:g} s as process {global_rank} of "
            f"{total_processes} ({error}); are all processes of both sites started with the same link.address?"
        ) from error
    return Link(rank, size, dist.PrefixStore(f"{name}/control", store), channels, scalars, timeout_s)


def _meet(store: Any, total_processes: int, timeout_s: float) -> None:
    """Return when every process of both sites is here.

    The first to come says how many there are. Groups of unequal sizes would wait for each other until the deadline.

    Raises:
        ConfigError: the sites were started for different numbers of processes.
        TimeoutError: some did not come in time.
    """
    first = int(store.compare_set("size", "", str(total_processes)))
    if first != total_processes:
        store.set("refused", f"one site was started for {first} processes in all and the other for {total_processes}")
    here, deadline = store.add("here", 1), time.monotonic() + timeout_s
    while here < first and not store.check(["refused"]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{here} of {first} processes came")
        time.sleep(_POLL_S)
        here = store.add("here", 0)
    if store.check(["refused"]):
        why = store.get("refused").decode()
        time.sleep(_POLL_S * 50)  # the process that holds the store stays until the others have read it too
        raise ConfigError(f"{why}; give both sites the same parallel sizes")


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
