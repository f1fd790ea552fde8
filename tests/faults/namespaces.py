"""Two sites in network namespaces of their own, joined by a wire that can be cut. Needs root and `ip`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

EDGE_ADDRESS, CLOUD_ADDRESS = "10.77.0.1", "10.77.0.2"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@dataclass(frozen=True)
class Wire:
    """Between the namespaces `edge` and `cloud`, whose ends are `ve` and `vc` with a number behind."""

    number: int

    def namespace(self, site: str) -> str:
        return f"ldt-{site}-{self.number}"

    def device(self, site: str) -> str:
        return f"v{site[0]}{self.number}"

    def cut(self) -> None:
        _ip("-n", self.namespace("edge"), "link", "set", self.device("edge"), "down")

    def join(self) -> None:
        _ip("-n", self.namespace("edge"), "link", "set", self.device("edge"), "up")

    def start(self, site: str, rank: int, processes: int, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
        """`ldt train --site` there; what it says goes to `log`."""
        address = EDGE_ADDRESS if site == "edge" else CLOUD_ADDRESS
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(processes), "MASTER_ADDR": address}
        command = [sys.executable, "-m", "ldt_schedules", "train", *arguments, "--site", site]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace(site), *command],
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
            env={**os.environ, **place, "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": self.device(site)},
        )


@contextmanager
def wire() -> Iterator[Wire]:
    """Made, and taken down again.

    Raises:
        OSError, subprocess.SubprocessError: this machine does not allow it.
    """
    made = Wire(os.getpid() % 10_000)
    edge, cloud = made.namespace("edge"), made.namespace("cloud")
    try:
        for namespace in (edge, cloud):
            _ip("netns", "add", namespace)
        _ip("link", "add", made.device("edge"), "type", "veth", "peer", "name", made.device("cloud"))
        for site, address in (("edge", EDGE_ADDRESS), ("cloud", CLOUD_ADDRESS)):
            _ip("link", "set", made.device(site), "netns", made.namespace(site))
            _ip("-n", made.namespace(site), "addr", "add", f"{address}/24", "dev", made.device(site))
            _ip("-n", made.namespace(site), "link", "set", made.device(site), "up")
            _ip("-n", made.namespace(site), "link", "set", "lo", "up")
        yield made
    finally:
        for namespace in (edge, cloud):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, timeout=20, check=False)
