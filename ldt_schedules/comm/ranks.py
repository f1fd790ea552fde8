"""Joins the processes of a pipeline that has no sites: one process a pipeline rank, all in one launch or each by hand."""

from __future__ import annotations

import os

from ldt_schedules.comm.link import connect
from ldt_schedules.comm.message_transport import MessageTransport
from ldt_schedules.errors import ConfigError


def connect_ranks(
    rank: int | None = None,
    num_ranks: int | None = None,
    address: tuple[str, int] | None = None,
    timeout_s: float = 300.0,
    backend: str = "auto",
    silence_s: float = 10.0,
) -> MessageTransport:
    """Join the others; returns when all ranks are there.

    Args:
        rank, num_ranks: of this process and in all; default: RANK and WORLD_SIZE, as torchrun sets them.
        address: host and port, where rank 0 listens; default: MASTER_ADDR and MASTER_PORT, where torchrun does.
        timeout_s: the deadline of every wait, seconds.
        backend: of the payloads: `auto` (the device's own), `gloo`, `nccl` or `hccl`.
        silence_s: a rank that is not heard of for so long is taken for dead, and all stop.

    Raises:
        ConfigError: neither arguments nor environment say who this process is.
        LdtError: the others did not come in time.
    """
    missing = [
        name
        for name, value in {
            "RANK": rank,
            "WORLD_SIZE": num_ranks,
            "MASTER_ADDR": address,
            "MASTER_PORT": address,
        }.items()
        if value is None and name not in os.environ
    ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not set: start the ranks with torchrun, or call connect_ranks(rank, num_ranks, (host, port))"
        )
    rank = int(os.environ["RANK"]) if rank is None else rank
    num_ranks = int(os.environ["WORLD_SIZE"]) if num_ranks is None else num_ranks
    host, port = address or (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    launcher_listens = address is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = rank == 0 and not launcher_listens
    name = f"ldt-ranks/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    link = connect(
        host=host, port=port, listen=listens, global_rank=rank, total_processes=num_ranks, timeout_s=timeout_s,
        backend=backend, name=name, silence_s=silence_s,
    )  # fmt: skip
    link.watch.settle()  # what its user builds, he builds before
    return MessageTransport(link)
