"""One site's process environment, made from the launcher's.

torch.distributed and Megatron read RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Where one launcher has started both
sites, each must get a rendezvous of its own, or the two would be one world:

    torchrun, 3 processes                       edge                      cloud
    RANK 0 1 2, WORLD_SIZE 3, port 29500   ──►  RANK 0, WORLD_SIZE 1,     RANK 0 1, WORLD_SIZE 2,
                                                port a                    port b          the link: port c

The first process of each site finds free ports on its own host and tells the others through the launcher's store.
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping
from datetime import timedelta

import torch.distributed as dist

from ldt_schedules.comm.ports import free_ports
from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.megatron_lm.sites import Sites
from ldt_schedules.topology import Site

Environment = MutableMapping[str, str]
_kept_open: list[dist.Store] = []
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_as(environment: Environment) -> tuple[int, int]:
    """RANK and WORLD_SIZE, as the user's launcher has set them.

    Raises:
        ConfigError: this process was not started by a launcher.
    """
    missing = [name for name in _NEEDED if name not in environment]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start the processes with a launcher, "
            "as torchrun --nproc-per-node 3 -m ldt_schedules launch pretrain_gpt.py ..."
        )
    return int(environment["RANK"]), int(environment["WORLD_SIZE"])


def enter_site(sites: Sites, environment: Environment) -> tuple[str, int]:
    """Make this process one of its site's world, in place.

    Returns:
        host and port of the link.

    Raises:
        LdtError: the other processes of the launch did not come in time.
    """
    link = sites.flags.link
    if sites.together:
        host, port, link = _own_rendezvous(sites, environment)
        environment["MASTER_ADDR"], environment["MASTER_PORT"] = host, str(port)
        # torchrun's own store would answer at the launcher's port, to both sites.
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    assert link is not None, "sites launched apart have been asked for --ldt-link"
    environment["RANK"] = str(sites.place.site_rank)
    environment["WORLD_SIZE"] = str(sites.topology.world_size(sites.place.site))
    return link


def _own_rendezvous(sites: Sites, environment: Environment) -> tuple[str, int, tuple[str, int]]:
    """Host and port of this process's site, and of the link."""
    store = _launch_store(environment, sites.place.global_rank, sites.flags.timeout_s)
    _kept_open.append(store)  # in its first process it is the server of the others
    place = sites.place
    if place.site_rank == 0:
        host = _own_host(environment)
        port, link_port = free_ports(2)
        store.set(f"ldt/{place.site}", f"{host} {port}")
        if place.site is Site.CLOUD:
            store.set("ldt/link", f"{host} {sites.flags.link[1] if sites.flags.link else link_port}")
    try:
        host, port = _read(store, f"ldt/{place.site}")
        link = sites.flags.link or _read(store, "ldt/link")
    except dist.DistStoreError as error:
        raise LdtError(
            f"waited {sites.flags.timeout_s:g} s for the first process of the {place.site} and of the cloud: {error}"
        ) from error
    return host, port, link


def _read(store: dist.Store, key: str) -> tuple[str, int]:
    host, port = store.get(key).decode().split()
    return host, int(port)


def _launch_store(environment: Environment, global_rank: int, timeout_s: float) -> dist.Store:
    """The store of the launch: torchrun's agent holds one; of other launchers the first process does."""
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        is_master=global_rank == 0 and not agent,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def _own_host(environment: Environment) -> str:
    """The address under which the other processes of the launch reach this host: that of its way to MASTER_ADDR."""
    address = (environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
    family, kind, _, _, target = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # a datagram socket sends nothing here, it only chooses a route
        return str(probe.getsockname()[0])
