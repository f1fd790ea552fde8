"""Samples with marked token ids and labels: no buffer that leaves the edge has one of the marks in it."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldt_schedules.errors import LdtError
from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.run_data import open_data
from tests.faults.canary import MARK, Listener, marked_tokens, text
from tests.helpers.workers import Workers, site_ports
from tests.training.checkpoint_runs import tiny


def be_process(
    config: TrainConfig, site: str, rank: int, ports: dict[str, int]
) -> tuple[list[str], int, int, list[str], bool]:
    """Train with a listener at the link.

    Gives what it found, buffers, bytes; how planted leaks were met, at the edge; whether this process opened the data.
    """
    from ldt_schedules.megatron import session, world
    from ldt_schedules.training import loop
    from ldt_schedules.training.process import open_process

    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[site]))
    listener, connect = Listener(marked_tokens(config_ids(config))), world.connect
    opened: list[str] = []
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)

    def tapped(**arguments: Any) -> Any:
        link = connect(**arguments)
        listener.tap(link)
        return link

    world.connect = tapped
    link = config.link.model_copy(update={"address": f"127.0.0.1:{ports['link']}"})
    process = open_process(config.model_copy(update={"link": link}), Site(site))
    for _ in loop.Loop(process, None, None).steps():
        pass
    leaks = planted(session.current(), listener, config_ids(config)) if site == "edge" else []
    found = listener.found, listener.buffers, listener.num_bytes, leaks, str(config.data.path) in opened
    world.close_site()
    return found


def test_the_cloud_opens_no_data(tmp_path: Path) -> None:
    """Also where the path exists on its machine."""
    config = tiny(tmp_path, f"data.path={corpus(tmp_path)}")
    assert open_data(config).vocab_size == 257
    with pytest.raises(LdtError, match="a process of the cloud opens no data"):
        open_data(config, Site.CLOUD)


def config_ids(config: TrainConfig) -> list[int]:
    """The token ids of the marks, as the run's own tokenizer makes them."""
    from ldt_schedules.training.tokenizer import open_tokenizer

    one = open_tokenizer(config.data.tokenizer).encode(text(4 * len(MARK)))
    return list(one[: len(one) // 4])


def planted(run: Any, listener: Listener, ids: list[int]) -> list[str]:
    """Somebody adds a send of the tokens, in five ways; all but the last are refused, and that one the listener hears."""
    from ldt_schedules.comm.gate import ResidencyError
    from ldt_schedules.comm.transport import TensorSpec
    from ldt_schedules.planning.channels import Lane
    from ldt_schedules.planning.dependencies import What

    tokens = torch.tensor([ids] * 2)
    spec = TensorSpec((16, 2, 32), torch.float32)
    told = []

    def send(content: torch.Tensor, declared: TensorSpec) -> None:
        run.transport.post_send(content, declared, what=What.ACTIVATION, peer=1, lane=Lane.PANG, tag=9)

    for attempt in (
        lambda: send(tokens, spec),
        lambda: send(tokens, TensorSpec(tuple(tokens.shape), tokens.dtype)),
        lambda: run.link.publish("header/99", {"step": 1, "tokens": tokens.tolist()}),
        lambda: run.link.sum_over_sites(tokens.double()),
    ):
        try:
            attempt()
            told.append("it passed")
        except ResidencyError as error:
            told.append(str(error))
    assert not listener.found, "a refused tensor was on its way"
    run.link.store.set("raw", tokens.numpy().tobytes())  # round the gate: the listener must hear that
    told.append(f"heard {len(listener.found)}")
    listener.found.clear()
    return told


def corpus(folder: Path) -> Path:
    path = folder / "marked.txt"
    path.write_bytes(text(20_000).encode("utf-8"))
    return path


def conversations(folder: Path) -> Path:
    """Packed into samples: the header then tells where in a sample each of them begins."""
    path = folder / "marked.jsonl"
    said = [{"role": role, "content": text(length)} for role, length in (("user", 40), ("assistant", 60))]
    path.write_text("".join(json.dumps({"messages": said}) + "\n" for _ in range(200)))
    return path


@pytest.mark.parametrize("data", [corpus, conversations])
def test_no_mark_leaves_the_edge(workers: Workers, tmp_path: Path, data: Callable[[Path], Path]) -> None:
    steps = ("train.iterations=3", "train.save_interval=0", "train.eval_interval=2", "model.seq_length=320")
    config = tiny(tmp_path, f"data.path={data(tmp_path)}", *steps)
    ports = site_ports()
    edge, *clouds = workers.run(
        be_process,
        [(config, str(site), rank, ports) for site in Site for rank in range(config.site_processes(site))],
    )
    assert edge[4] and not any(cloud[4] for cloud in clouds), "the data are opened at the edge, and there alone"
    for found, buffers, num_bytes, *_ in (edge, *clouds):
        assert found == []
        assert buffers > 50 and num_bytes > 50_000
    leaks = edge[3]
    assert all("may not leave the edge" in leak for leak in leaks[:4]), leaks
    assert leaks[4] == "heard 1"


_SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_STATISTICS = 33, 263, 6  # asm-generic/socket.h, linux/socket.h, linux/if_packet.h


def sniff(packets: socket.socket, stop: threading.Event, listener: Listener) -> None:
    packets.settimeout(0.2)
    while not stop.is_set():
        try:
            listener.hear("lo", packets.recv(1 << 17))
        except TimeoutError:
            continue


def test_no_mark_is_on_the_wire(workers: Workers, tmp_path: Path) -> None:
    """Every packet of this machine's loopback while two sites train: what no wrapper of ours could have missed.

    A mark that two packets share would be missed; every sample has hundreds.
    """
    try:
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        packets.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 28)
        packets.bind(("lo", 0))
    except (OSError, AttributeError) as error:
        pytest.skip(f"packets can be read by root on Linux only: {error}")
    config = tiny(tmp_path, f"data.path={corpus(tmp_path)}", "train.iterations=2", "train.save_interval=0")
    listener, stop = Listener(marked_tokens(config_ids(config))), threading.Event()
    thread = threading.Thread(target=sniff, args=(packets, stop, listener))
    thread.start()
    ports = site_ports()
    try:
        workers.run(
            be_process_unheard,
            [(config, str(site), rank, ports) for site in Site for rank in range(config.site_processes(site))],
        )
        _, dropped = struct.unpack("II", packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        assert listener.num_bytes > 100_000 and listener.found == [] and dropped == 0
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as leak:
            leak.sendall(torch.tensor(config_ids(config) * 2).numpy().tobytes())
            for _ in range(50):
                if listener.found:
                    break
                stop.wait(0.1)
        assert listener.found, "the listener would not have heard a leak"
    finally:
        stop.set()
        thread.join()
        packets.close()


def be_process_unheard(config: TrainConfig, site: str, rank: int, ports: dict[str, int]) -> None:
    from ldt_schedules.megatron import world
    from ldt_schedules.training import loop
    from ldt_schedules.training.process import open_process

    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[site]))
    link = config.link.model_copy(update={"address": f"127.0.0.1:{ports['link']}"})
    process = open_process(config.model_copy(update={"link": link}), Site(site))
    for _ in loop.Loop(process, None, None).steps():
        pass
    world.close_site()
