"""A few processes, started once, that run test functions as the ranks of a world.

Importing torch and Megatron takes longer than most tests. So one process imports them, the workers are forked from it,
and a test sends them a module-level function and one argument tuple for each rank.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from ldt_schedules.training.local_run import free_ports

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.preload"])


class WorkerFailure(AssertionError):
    """One or more ranks raised, died or did not answer in time."""


def site_ports() -> dict[str, int]:
    """A port for each site's own rendezvous and one for the link."""
    return dict(zip(("edge", "cloud", "link"), free_ports(3), strict=True))


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Workers:
    """Grows to the largest world asked for; a failed call replaces all processes."""

    def __init__(self) -> None:
        self._running: list[tuple[Any, Connection]] = []

    def run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], timeout_s: float = 90
    ) -> list[Any]:
        """Call `function(*arguments[rank])` on rank 0, 1, …, all at once; return what each gave.

        Raises:
            WorkerFailure: with the traceback of every rank that failed.
        """
        while len(self._running) < len(arguments):
            self._start()
        used = self._running[: len(arguments)]
        for (_, pipe), argument in zip(used, arguments, strict=True):
            pipe.send((function, argument))
        answers, failures = self._collect(used, timeout_s)
        if failures:
            self.stop()
            raise WorkerFailure("\n".join(failures))
        return [answers[rank] for rank in range(len(used))]

    @staticmethod
    def _collect(used: list[tuple[Any, Connection]], timeout_s: float) -> tuple[dict[int, Any], list[str]]:
        """Answers by rank, and failures, the first that happened first; after one the others get few seconds more."""
        rank_of = {id(pipe): rank for rank, (_, pipe) in enumerate(used)}
        waiting = [pipe for _, pipe in used]
        answers: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout_s
        while waiting and time.monotonic() < deadline:
            for pipe in wait(waiting, timeout=max(0.1, deadline - time.monotonic())):
                waiting.remove(pipe)  # type: ignore[arg-type]
                try:
                    fine, answer = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    fine, answer = False, "its process died"
                answers[rank_of[id(pipe)]] = answer
                if not fine:
                    failures.append(f"rank {rank_of[id(pipe)]}:\n{answer}")
                    deadline = min(deadline, time.monotonic() + 5)
        failures += [f"rank {rank_of[id(pipe)]} did not answer" for pipe in waiting]
        return answers, failures

    def _start(self) -> None:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._running.append((process, ours))

    def stop(self) -> None:
        for process, pipe in self._running:
            pipe.close()
            process.kill()
        for process, _ in self._running:
            process.join(timeout=10)
        self._running.clear()


os.environ.setdefault("OMP_NUM_THREADS", "1")
