"""The link with real processes and real gloo groups."""

from __future__ import annotations

import re
import time

import pytest

from ldt_schedules.comm.ports import free_ports


def exchange(rank: int, size: int, port: int) -> dict[str, object]:
    """Send to the next rank and to the one before, both at once, on the lanes of the U."""
    import torch

    from ldt_schedules.comm.link import connect
    from ldt_schedules.comm.torch_transport import ProcessTransport
    from ldt_schedules.comm.transport import TensorSpec
    from ldt_schedules.planning.channels import lane

    link = connect(
        host="127.0.0.1", port=port, listen=rank == size - 1, global_rank=rank, total_processes=size, timeout_s=30
    )
    transport = ProcessTransport(link)
    peers = {"up": (rank + 1) % size, "down": (rank - 1) % size}
    spec = TensorSpec((1000,), torch.float32)
    receiving = {
        name: transport.post_recv(
            transport.buffer(spec, lane(peer, rank)),
            peer,
            lane=lane(peer, rank),
            tag=0 if name == "down" else 1,
            what=f"rank {peer}",
        )
        for name, peer in peers.items()
    }
    sending = [
        transport.post_send(
            torch.full((1000,), float(rank)),
            peer,
            lane=lane(rank, peer),
            tag=0 if name == "up" else 1,
            what=f"rank {peer}",
        )
        for name, peer in peers.items()
    ]
    got = {}
    for name, handle in receiving.items():
        handle.wait()
        got[name] = float(handle.buffer.mean())
    for handle in sending:
        handle.wait()
    assert all(handle.is_complete() for handle in sending)
    total = link.sum_over_sites(torch.tensor([float(rank)])).item()
    groups = {id(channel.group) for channel in link.channels.values()}
    link.publish(f"hello/{rank}", {"rank": rank})
    heard = link.fetch(f"hello/{(rank + 1) % size}", "a greeting")
    link.wait_for_all()
    return {
        "got": got,
        "total": total,
        "groups": len(groups),
        "heard": heard,
        "initialized": torch.distributed.is_initialized(),
    }


@pytest.mark.parametrize("size", [2, 3, 4])
def test_both_directions_at_once(workers, size):
    """P = 2 (both neighbours are one rank), an odd and an even ring; upstream joins both lanes at P = 2 (D26)."""
    port = free_ports(1)[0]
    for rank, seen in enumerate(workers.run(exchange, [(rank, size, port) for rank in range(size)])):
        assert seen["got"] == {"up": (rank + 1) % size, "down": (rank - 1) % size}
        assert seen["total"] == sum(range(size))
        assert seen["groups"] == 4, "each lane has a group of its own"
        assert seen["heard"] == {"rank": (rank + 1) % size}
        assert not seen["initialized"], "the link made a torch.distributed world"


def wait_for_nobody(port: int) -> tuple[str, float]:
    from ldt_schedules.comm.link import connect
    from ldt_schedules.errors import LdtError

    start = time.monotonic()
    try:
        connect(host="127.0.0.1", port=port, listen=True, global_rank=0, total_processes=2, timeout_s=2)
    except LdtError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("joined a link alone")


def test_nobody_there_is_an_error_within_the_deadline(workers):
    ((message, waited),) = workers.run(wait_for_nobody, [(free_ports(1)[0],)])
    assert "could not join the link" in message and "process 0 of 2" in message
    assert waited < 15


def join_as_one_of(rank: int, size: int, port: int) -> tuple[str, float]:
    from ldt_schedules.comm.link import connect
    from ldt_schedules.errors import ConfigError

    start = time.monotonic()
    try:
        connect(host="127.0.0.1", port=port, listen=rank == 0, global_rank=rank, total_processes=size, timeout_s=60)
    except ConfigError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("joined a link of another size")


def test_sites_that_count_differently_are_told_on_every_process(workers):
    port = free_ports(1)[0]
    told = workers.run(join_as_one_of, [(0, 3, port), (1, 3, port), (2, 4, port)])
    for message, waited in told:
        assert re.search(
            r"for (3 processes in all and the other for 4|4 processes in all and the other for 3)", message
        )
        assert "give both sites the same parallel sizes" in message and waited < 30


def no_message(rank: int, port: int) -> str:
    import torch

    from ldt_schedules.comm.link import connect
    from ldt_schedules.comm.torch_transport import ProcessTransport
    from ldt_schedules.comm.transport import TensorSpec
    from ldt_schedules.errors import LdtError
    from ldt_schedules.planning.channels import Lane

    link = connect(host="127.0.0.1", port=port, listen=rank == 0, global_rank=rank, total_processes=2, timeout_s=3)
    if rank == 1:
        time.sleep(4)
        return ""
    transport = ProcessTransport(link)
    buffer = transport.buffer(TensorSpec((4,), torch.float32), Lane.PING)
    handle = transport.post_recv(buffer, 1, lane=Lane.PING, tag=0, what="pipeline rank 1")
    try:
        handle.wait()
    except LdtError as error:
        return str(error)
    raise AssertionError("received what nobody sent")


def test_a_receive_ends_at_its_deadline_and_names_the_peer(workers):
    port = free_ports(1)[0]
    message, _ = workers.run(no_message, [(rank, port) for rank in range(2)])
    assert "receiving from pipeline rank 1 on PING failed or took longer than 3 s" in message


def claim(rank: int, port: int, listen: bool) -> str:
    """Join as one of three."""
    from ldt_schedules.comm.link import connect
    from ldt_schedules.errors import ConfigError

    try:
        connect(host="127.0.0.1", port=port, listen=listen, global_rank=rank, total_processes=3, timeout_s=30)
    except ConfigError as error:
        return str(error)
    return "joined"


def test_two_processes_that_claim_the_same_rank(workers):
    (port,) = free_ports(1)
    for told in workers.run(claim, [(0, port, True), (1, port, False), (1, port, False)]):
        assert "two processes claim to be process 1 of the run: rank 1 on" in told
        assert told.count("(pid ") == 2 and "start each process once" in told


STRANGE = (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4096, b"\xff" * 4096, bytes(range(256)) * 300, b"")


def with_strangers(rank: int, port: int) -> tuple[float, dict[str, int]]:
    """Two processes joined by a link; meanwhile somebody speaks to the store's port."""
    import socket

    import torch

    from ldt_schedules.comm.link import connect

    link = connect(host="127.0.0.1", port=port, listen=rank == 0, global_rank=rank, total_processes=2, timeout_s=20)
    strangers = []
    for garbage in STRANGE if rank == 1 else ():
        strangers.append(socket.create_connection(("127.0.0.1", port), timeout=3))
        strangers[-1].sendall(garbage)
    link.wait_for_all()
    if rank == 0:
        link.publish("word", {"given": 7})
    answer = link.sum_over_sites(torch.ones(1, dtype=torch.float64)).item(), link.fetch("word", "a word")
    link.wait_for_all()
    for stranger in strangers:
        stranger.close()
    link.close()
    return answer


def test_strangers_at_the_stores_port(workers):
    (port,) = free_ports(1)
    assert workers.run(with_strangers, [(rank, port) for rank in range(2)]) == [(2.0, {"given": 7})] * 2
