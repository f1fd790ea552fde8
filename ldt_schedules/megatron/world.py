"""Opens and closes what a process takes part in: its site's own Megatron world, and the link to the other site."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from ldt_schedules import device
from ldt_schedules.comm.boundary import BoundaryTransport, TensorGroup
from ldt_schedules.comm.flight_recorder import FlightRecorder
from ldt_schedules.comm.gate import Gate
from ldt_schedules.comm.ledger_file import LedgerFile
from ldt_schedules.comm.link import connect
from ldt_schedules.comm.stopping import Stopping
from ldt_schedules.comm.torch_transport import ProcessTransport
from ldt_schedules.comm.watch import Members
from ldt_schedules.megatron import session
from ldt_schedules.megatron.session import Session, TableSource
from ldt_schedules.topology import Place, Site, Topology

FLIGHT_DIR, LEDGER_DIR = "flight", "ledger"
"""In the run's directory."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a store listens."""

    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Vigilance:
    """How the processes of a run look after each other.

    Attributes:
        silence_s: a process that is not heard of for so long is taken for lost, and all stop; 0: only one that has gone.
        quiet_s: a process that waits for so long says for what; 0: never.
        directory: of the run: a process keeps its ledger there, and when the run fails what it did last; None: nowhere.
        stops: end this process when another fails, wherever it is.
    """

    silence_s: float = 0.0
    quiet_s: float = 0.0
    directory: Path | None = None
    stops: bool = False


def open_site(topology: Topology, place: Place, rendezvous: Address, timeout_s: float, seed: int) -> None:
    """This site's torch.distributed world and its parallel groups: stock Megatron, of the site's own sizes.

    Args:
        rendezvous: of the site alone (MASTER_ADDR and MASTER_PORT of its own launcher).
        timeout_s: deadline of the site's collectives.
    """
    size = topology.size(place.site)
    torch.distributed.init_process_group(
        backend=device.collective_backend(),
        init_method=f"tcp://{rendezvous.host}:{rendezvous.port}",
        rank=place.site_rank,
        world_size=topology.world_size(place.site),
        timeout=timedelta(seconds=timeout_s),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=size.tensor,
        pipeline_model_parallel_size=topology.pipeline_size(place.site),
        context_parallel_size=size.context,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def join_link(
    topology: Topology,
    place: Place,
    address: Address,
    table_for: TableSource,
    timeout_s: float,
    backend: str = "auto",
    lead: bool = False,
    vigilance: Vigilance = Vigilance(),
) -> Session:
    """Connect to the other site and make the session of this process. The cloud's first process listens.

    Args:
        backend: see `comm.link.connect`.
        lead: between the sites one process of each tensor-parallel group sends and receives for all.
    """
    flight, gate = FlightRecorder(), Gate(str(place.site))
    directory = vigilance.directory
    recorded = None if directory is None else directory / FLIGHT_DIR
    stopping = Stopping(place.name, flight_place(topology, place), flight, recorded, vigilance.quiet_s)
    acts = {"on_cause": stopping.on_cause, "on_turn": stopping.on_turn} if vigilance.stops else {}
    link = connect(
        host=address.host,
        port=address.port,
        listen=place.site is Site.CLOUD and place.site_rank == 0,
        global_rank=place.global_rank,
        total_processes=topology.total_processes,
        timeout_s=timeout_s,
        backend=backend,
        members=members_of(topology),
        silence_s=vigilance.silence_s,
        flight=flight,
        gate=gate,
        **acts,
    )
    group = TensorGroup(
        rank=place.tensor_rank,
        size=topology.size(place.site).tensor,
        split=topology.size(place.site).sequence_parallel,
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    transport = BoundaryTransport(ProcessTransport(link), topology, place, group, lead, gate=gate)
    run = Session(topology, place, link, transport, table_for)
    session.install(run)
    if directory is not None:  # only now: what is wrong with the directory must be told to the others
        members = tuple(link.watch.members.names)
        run.ledger = LedgerFile(
            directory / LEDGER_DIR, place.name, str(place.site), link.watch.run, members, gate.ledger
        )
        stopping.ledger = run.ledger
    return run


def members_of(topology: Topology) -> Members:
    """Of both sites; the cloud's first process serves, as it does the link's store."""
    places = topology.places()
    server = topology.place(Site.CLOUD, 0).global_rank
    return Members([place.name for place in places], [str(place.site) for place in places], server)


def flight_place(topology: Topology, place: Place) -> dict[str, Any]:
    """What a flight recorder's file says of whose it is."""
    return {
        "site": str(place.site),
        "site_rank": place.site_rank,
        "pipeline_rank": place.pipeline_rank,
        "processes": topology.total_processes,
    }


def leave_link(abandon: bool = False) -> None:
    """Leave the link, if this process has joined one; its site's world stays.

    Args:
        abandon: do not wait for the others, something went wrong. Without it a process leaves when all are done, so
            that none takes a connection away under another's last message.
    """
    run = session.current()
    if run is not None:
        if not abandon:
            run.link.wait_for_all()
        if run.ledger is not None:
            run.ledger.close(complete=not abandon)
        session.uninstall()
        run.link.close(abandon)


def close_site(abandon: bool = False) -> None:
    """Leave the link and the site's world; the process may open others afterwards."""
    leave_link(abandon)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
