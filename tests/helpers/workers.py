"""Runs test functions as the ranks of a world, in real processes.

Importing torch and Megatron takes longer than most tests. So one process imports them, once, and the ranks are forked
from it; a test names a module-level function and one tuple of arguments for each rank.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from ldt_schedules.comm.ports import free_ports

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.preload"])


class WorkerFailure(AssertionError):
    """One or more ranks raised, died or did not answer in time."""


def site_ports() -> dict[str, int]:
    """A port for each site's own rendezvous and one for the link."""
    return dict(zip(("edge", "cloud", "link"), free_ports(3), strict=True))


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], bare: bool) -> None:
    import torch

    import patches

    torch.set_num_threads(1)
    if bare:
        patches.revert_all()
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


class Workers:
    """Runs functions as the ranks of a world, each call in new processes.

    New ones, because gloo keeps a few threads for every group that was ever made: a process that has been in dozens of
    worlds is slower than a fork.
    """

    def run(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        timeout_s: float = 90,
        bare: bool = False,
    ) -> list[Any]:
        """Call `function(*arguments[rank])` on rank 0, 1, …, all at once; return what each gave.

        Args:
            bare: in processes without our patches: Megatron as it is installed, transformers as it is meant (under the CPU
                adaptor its from_pretrained leaves tables of rotary angles empty).

        Raises:
            WorkerFailure: with the traceback of every rank that failed.
        """
        running = [self._start(function, argument, bare) for argument in arguments]
        try:
            answers, failures = self._collect(running, timeout_s)
        finally:
            for process, pipe in running:
                pipe.close()
                process.kill()
            for process, _ in running:
                process.join(timeout=10)
        if failures:
            raise WorkerFailure("\n".join(failures))
        return [answers[rank] for rank in range(len(running))]

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

    @staticmethod
    def _start(function: Callable[..., Any], arguments: tuple[Any, ...], bare: bool) -> tuple[Any, Connection]:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_answer, args=(theirs, function, arguments, bare), daemon=True)
        process.start()
        theirs.close()
        return process, ours


os.environ.setdefault("OMP_NUM_THREADS", "1")
