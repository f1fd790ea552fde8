"""A run on one machine: which children the launcher starts, with which environment and which ports."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ldt_schedules.comm.ports import free_ports
from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.launcher import Child, run_all

LOG_DIR = "logs"

_HOST = "127.0.0.1"


def run_locally(config_path: str, config: TrainConfig, overrides: Sequence[str], *, json_output: bool = False) -> None:
    """Train on this machine alone: all processes of both sites, until they have ended.

    Raises:
        ChildFailed, Stopped: see `launcher.run_all`.
    """
    run_all(list(children(config_path, config, overrides, json_output)), Path(config.train.output_dir) / LOG_DIR)


def children(config_path: str, config: TrainConfig, overrides: Sequence[str], json_output: bool) -> Iterator[Child]:
    """Each process of a training run, the edge's first, which shows the run."""
    first, *others = processes(config, ["train", config_path, *overrides])
    yield replace(first, argv=[*first.argv, "--json"] if json_output else first.argv, owns_terminal=True)
    yield from others


def processes(config: TrainConfig, command: Sequence[str], environment: Mapping[str, str] | None = None) -> list[Child]:
    """Each process of both sites, the edge's first. Ports are chosen here.

    Args:
        command: `ldt` is called with it, and with the link's address and `--site` besides.
        environment: for every process, besides its place.
    """
    sites = [site for site in Site if config.site_processes(site)]
    link_port, *site_ports = free_ports(1 + len(sites))
    link = [f"link.address={config.link.host}:{link_port}"] if config.link.port == 0 else []
    started: list[Child] = []
    for site, port in zip(sites, site_ports, strict=True):
        argv = [sys.executable, "-m", "ldt_schedules", *command, *link, "--site", str(site)]
        for rank in range(config.site_processes(site)):
            place = _environment(config, site, rank, len(started), port)
            started.append(Child(config.topology.place(site, rank).name, argv, {**(environment or {}), **place}))
    return started


def _environment(config: TrainConfig, site: Site, rank: int, local_rank: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(config.site_processes(site)),
        # Counts over both sites: they share this machine, and two processes must not take one accelerator.
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(config.topology.total_processes),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(config.train.threads),
    }
