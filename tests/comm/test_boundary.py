"""Tensors between groups of unequal size, with real processes and real gloo groups."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ldt_schedules.comm.ports import free_ports
from ldt_schedules.topology import SiteSize, Topology

SHAPE = (24, 2, 3)
ODD_SHAPE = (20, 1, 2)  # what 3 processes cannot share
SIZES = (1, 2, 3, 4)


def topologies(split: bool) -> list[Topology]:
    return [
        Topology(2, SiteSize(e, sequence_parallel=a), SiteSize(c, sequence_parallel=b))
        for e, c in itertools.product(SIZES, SIZES)
        for a, b in itertools.product((False, True), repeat=2)
        if split in (a, b) and (e > 1 or not a) and (c > 1 or not b)
    ]


def cases(split: bool) -> list[tuple[Topology, bool, tuple[int, ...]]]:
    """With each mode and shape; what a site cannot share under sequence parallelism is refused before anything starts."""
    return [
        (topology, lead, shape)
        for topology in topologies(split)
        for lead in (False, True)
        for shape in (SHAPE, ODD_SHAPE)
        if not any(site.sequence_parallel and shape[0] % site.tensor for site in (topology.edge, topology.cloud))
    ]


def there_and_back(boundary: Any, shape: tuple[int, ...], number: int) -> dict[str, Any]:
    """The edge sends a tensor up, the cloud sends what it has got back."""
    import torch

    from ldt_schedules.comm.transport import TensorSpec
    from ldt_schedules.planning.channels import lane
    from ldt_schedules.planning.dependencies import What

    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    local = boundary.group.part_of(whole) if boundary.group.split else whole
    here = boundary.place.pipeline_rank
    there = 1 - here
    up, down = 2 * number, 2 * number + 1
    spec = TensorSpec(tuple(local.shape), local.dtype)
    if here == 0:
        sent = boundary.post_send(local, spec, what=What.ACTIVATION, peer=there, lane=lane(here, there), tag=up)
        got = boundary.post_recv(spec, what=What.GRADIENT, peer=there, lane=lane(there, here), tag=down).wait()
    else:
        got = boundary.post_recv(spec, what=What.ACTIVATION, peer=there, lane=lane(there, here), tag=up).wait()
        sent = boundary.post_send(got, spec, what=What.GRADIENT, peer=there, lane=lane(here, there), tag=down)
    sent.wait()
    return {
        "case": f"{boundary.topology}, lead {boundary.lead}, {shape}",
        "right": torch.equal(got, local) and got.shape == local.shape,
        "owns its memory": got.untyped_storage().nbytes() == got.nbytes,
        "sent": boundary.traffic.sent_bytes,
        "received": boundary.traffic.received_bytes,
        "whole": whole.nbytes,
    }


def run_cases(rank: int, size: int, ports: list[int], split: bool) -> list[dict[str, Any]]:
    """Every case, in as many of the processes as its topology has."""
    import torch.distributed as dist

    from ldt_schedules.comm.boundary import BoundaryTransport, TensorGroup
    from ldt_schedules.comm.link import connect
    from ldt_schedules.comm.torch_transport import ProcessTransport

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{ports[0]}", rank=rank, world_size=size)
    groups = {
        (first, count): dist.new_group(list(range(first, first + count)))
        for first in range(size)
        for count in SIZES
        if first + count <= size
    }
    link = connect(
        host="127.0.0.1", port=ports[1], listen=rank == 0, global_rank=rank, total_processes=size, timeout_s=30
    )
    seen = []
    for number, (topology, lead, shape) in enumerate(cases(split)):
        if rank < topology.total_processes:
            place = topology.place_of_global_rank(rank)
            mine = topology.size(place.site)
            first = rank - place.tensor_rank
            group = TensorGroup(place.tensor_rank, mine.tensor, mine.sequence_parallel, groups[first, mine.tensor])
            boundary = BoundaryTransport(ProcessTransport(link), topology, place, group, lead)
            seen.append(
                {"number": number, "site": str(place.site), "lead": lead, **there_and_back(boundary, shape, number)}
            )
    link.wait_for_all()
    dist.destroy_process_group()
    return seen


@pytest.mark.parametrize("split", [False, True])
def test_every_pair_of_sizes_both_modes_both_ways(workers, split):
    """Each process gets the part it must hold, and one copy crosses in either direction, whoever carries it."""
    size = 2 * max(SIZES)
    ports = free_ports(2)
    ranks = workers.run(run_cases, [(rank, size, ports, split) for rank in range(size)], timeout_s=100)
    by_case: dict[int, list[dict[str, Any]]] = {}
    for seen in itertools.chain(*ranks):
        assert seen["right"] and seen["owns its memory"], seen["case"]
        by_case.setdefault(seen["number"], []).append(seen)
    assert len(by_case) >= 40
    for processes in by_case.values():
        for site in ("edge", "cloud"):
            of_site = [seen for seen in processes if seen["site"] == site]
            assert sum(seen["sent"] for seen in of_site) == of_site[0]["whole"], of_site[0]["case"]
            if not of_site[0]["lead"]:
                continue
            assert sum(seen["sent"] > 0 for seen in of_site) == 1, "in mode lead one process sends"


def test_slices_are_spread_evenly():
    """Every process of both sites carries the same share of the tensor."""
    for edge, cloud in itertools.product(SIZES, SIZES):
        topology = Topology(2, SiteSize(edge), SiteSize(cloud))
        for place in topology.places():
            pieces = topology.pieces(place, 1 - place.pipeline_rank)
            share = sum(piece.stop - piece.start for piece in pieces) / topology.parts
            assert share == pytest.approx(1 / topology.size(place.site).tensor)
