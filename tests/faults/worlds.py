"""Runs of the trainer whose processes may die: each in a process of its own, seen from outside."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import signal
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from tests.faults.injection import Fault, FaultyRecorder
from tests.helpers.workers import CONTEXT, site_ports


@dataclass(frozen=True)
class Ended:
    """A process, seen from outside.

    Attributes:
        code: its exit code; None: it had to be killed, because it hung.
        after_s: when it ended, counted from the fault; without one from the start.
        said: all that it printed.
    """

    name: str
    code: int | None
    after_s: float
    said: str


def run_until_ended(
    config: TrainConfig,
    folder: Path,
    fault: Fault | None = None,
    within_s: float = 60.0,
    wake_after_s: float | None = None,
) -> list[Ended]:
    """Every process of a run, until all have ended or `within_s` have gone by.

    Args:
        wake_after_s: a process that the fault has frozen is woken so long after.
    """
    ports, started = site_ports(), time.time()
    processes = {}
    for site in Site:
        for rank in range(config.site_processes(site)):
            name = f"{site} rank {rank}"
            own = fault if fault is not None and fault.process == name else None
            arguments = (config, str(site), rank, ports, own, str(folder / f"{name}.log"))
            processes[name] = CONTEXT.Process(target=_be_process, args=arguments, daemon=True)
    for process in processes.values():
        process.start()
    if wake_after_s is not None:
        assert fault is not None
        _wake(processes[fault.process].pid, fault, wake_after_s, within_s)
    ended = _when(processes, fault, started + within_s)
    begin = float(fault.at.read_text()) if fault is not None and fault.at.exists() else started
    return [
        Ended(name, processes[name].exitcode, at - begin, (folder / f"{name}.log").read_text())
        if at is not None
        else Ended(name, None, within_s, (folder / f"{name}.log").read_text())
        for name, at in ended.items()
    ]


def _wake(pid: int, fault: Fault, after_s: float, within_s: float) -> None:
    deadline = time.time() + within_s
    while not fault.at.exists() and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):  # what became of it, its exit code says
        os.kill(pid, signal.SIGCONT)


def _when(processes: dict[str, Any], fault: Fault | None, deadline: float) -> dict[str, float | None]:
    """When each ended; those that did not are killed. One that the fault froze is not waited for."""
    ended: dict[str, float | None] = dict.fromkeys(processes)
    waiting = {process.sentinel: name for name, process in processes.items()}
    while waiting and time.time() < deadline:
        for sentinel in multiprocessing.connection.wait(list(waiting), timeout=0.5):
            ended[waiting.pop(sentinel)] = time.time()  # type: ignore[index]
        if fault is not None and fault.how == "stop" and list(waiting.values()) == [fault.process]:
            os.kill(processes[fault.process].pid, signal.SIGCONT)  # woken, it must find out and go
    for process in processes.values():
        if process.is_alive():
            process.kill()
        process.join(10)
    return ended


def _be_process(
    config: TrainConfig, site: str, rank: int, ports: dict[str, int], fault: Fault | None, log: str
) -> None:
    """What `ldt train --site` does, without a screen; weights at the end go to a file."""
    from ldt_schedules.cli.errors import messages_for_people
    from ldt_schedules.comm.stopping import leave_now
    from ldt_schedules.megatron import world
    from ldt_schedules.megatron.stopping_together import stopping_together

    _speak_into(log)
    warnings.simplefilter("ignore")
    place = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[site])}
    os.environ.update(place)
    link = config.link.model_copy(update={"address": f"127.0.0.1:{ports['link']}"})
    FaultyRecorder.fault = fault
    world.FlightRecorder = FaultyRecorder  # type: ignore[misc]
    try:
        with messages_for_people(), stopping_together():
            _train(config.model_copy(update={"link": link}), Site(site))
    except SystemExit as stop:
        leave_now(int(stop.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
        leave_now(1)
    leave_now(0)


def _speak_into(log: str) -> None:
    target = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)


def _train(config: TrainConfig, site: Site) -> None:
    from ldt_schedules.megatron import world
    from ldt_schedules.training import loop
    from ldt_schedules.training.checkpointing import saver
    from ldt_schedules.training.process import open_process

    process = open_process(config, site)
    for _ in loop.Loop(process, None, saver(process.start, config, process.place)).steps():
        pass
    weights = Path(config.train.output_dir) / "weights"
    weights.mkdir(exist_ok=True)
    np.savez(weights / f"{site}{process.place.site_rank}.npz", **weights_of(process))
    world.close_site()


def weights_of(process: Any) -> dict[str, np.ndarray]:
    from ldt_schedules.megatron.chunks import global_parameters

    return {name: p.detach().numpy().copy() for name, p in global_parameters(process.trained.model)}


def saved_weights(output: Path) -> dict[str, np.ndarray]:
    """Of a run that came to its end: by process and name."""
    return {
        f"{path.stem} {name}": array
        for path in sorted((output / "weights").glob("*.npz"))
        for name, array in np.load(path).items()
    }


def resume_all(configs: list[TrainConfig], site: str, rank: int, ports: dict[str, int]) -> list[dict[str, np.ndarray]]:
    """One process: take up each of the runs where its checkpoints end, one after the other in one world, to their ends.

    Everything that a start of the trainer does with checkpoints is done for each; model and link are built once.
    """
    from ldt_schedules.megatron import session, world
    from ldt_schedules.training import loop
    from ldt_schedules.training.checkpointing import find_start, restore
    from ldt_schedules.training.process import open_process

    warnings.simplefilter("ignore")
    place = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[site])}
    os.environ.update(place)
    update = {"link": configs[0].link.model_copy(update={"address": f"127.0.0.1:{ports['link']}"})}
    process = open_process(configs[0].model_copy(update=update), Site(site))
    found = []
    for config in configs:
        start = find_start(config, process.place, session.current())
        process = replace(process, config=config, start=start)
        process.trained.scheduler.num_steps = 0  # Megatron's adds what it loads to what it has
        restore(start, config, process.place, session.current(), process.trainee)
        for _ in loop.Loop(process, None, None).steps():
            pass
        found.append(weights_of(process))
    world.close_site()
    return found
