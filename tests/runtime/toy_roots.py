"""A small model with three roots, and the same in one process: linear heads of different widths, rows that vary.

audio [a, 5] ─┐
vision [v, 7] ─┼─► join: rows one after the other ─► middle ─► last ─► mean of squares against a target
text [t, 3] ──┘
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ldt_schedules.errors import LdtError
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats import grid
from ldt_schedules.runtime import PipelineRunner, connect_ranks
from ldt_schedules.runtime.module_stages import ModuleStages

WIDTH = 6
HEADS = {0: 5, 1: 7, 2: 3}


class Join(torch.nn.Module):
    """Concatenates the rows of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, *parts: torch.Tensor | None) -> torch.Tensor:
        return torch.tanh(self.linear(torch.cat([part for part in parts if part is not None])))


def modules(dtype: torch.dtype) -> dict[int, torch.nn.Module]:
    """Stage -> module; the same on every process."""
    torch.manual_seed(3)
    found: dict[int, torch.nn.Module] = {stage: torch.nn.Linear(width, WIDTH) for stage, width in HEADS.items()}
    found[3] = Join()
    found[4] = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())
    found[5] = torch.nn.Linear(WIDTH, 2)
    return {stage: module.to(dtype) for stage, module in found.items()}


def inputs(stage: int, num_microbatches: int, dtype: torch.dtype, iteration: int) -> list[torch.Tensor | None]:
    """Of a root: as many rows as nobody else has; microbatch 1 has no audio, microbatch 2 no image."""
    made: list[torch.Tensor | None] = []
    for m in range(num_microbatches):
        generator = torch.Generator().manual_seed(1000 * iteration + 10 * m + stage)
        absent = (stage, m) in ((0, 1), (1, 2))
        rows = 2 + stage + 3 * m + iteration
        made.append(None if absent else torch.randn(rows, HEADS[stage], dtype=dtype, generator=generator))
    return made


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).mean()


def targets(num_microbatches: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.full((2,), 0.1 * m, dtype=dtype) for m in range(num_microbatches)]


Outcome = tuple[list[float], dict[str, np.ndarray]]
"""Losses, and gradients by stage and parameter name."""


def _gradients(stages: dict[int, torch.nn.Module]) -> dict[str, np.ndarray]:
    return {
        f"{stage}.{name}": parameter.grad.numpy()
        for stage, module in stages.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def one_process(num_microbatches: int, dtype: torch.dtype, iterations: int, weights: list[float]) -> Outcome:
    """Microbatch after microbatch, by autograd alone."""
    stages, losses = modules(dtype), []
    for iteration in range(iterations):
        data = {stage: inputs(stage, num_microbatches, dtype, iteration) for stage in HEADS}
        for m, target in enumerate(targets(num_microbatches, dtype)):
            heads = [None if data[stage][m] is None else stages[stage](data[stage][m]) for stage in HEADS]
            one = loss(stages[5](stages[4](stages[3](*heads))), target)
            losses.append(one.item())
            (one * weights[m]).backward()
    return losses, _gradients(stages)


def run_rank(rank: int, num_ranks: int, port: int, text: str, options: dict[str, Any]) -> Outcome:
    """One process of the pipeline. `options`: dtype, iterations, something that goes wrong, and what `PipelineRunner` takes."""
    options = dict(options)
    dtype, iterations = options.pop("dtype", torch.float64), options.pop("iterations", 1)
    wrong = {name: options.pop(name, None) for name in ("fail", "kill", "wrong_gradient", "mistake")}
    table = grid.loads(text)
    silence_s = options.pop("silence_s", 10.0)
    transport = connect_ranks(rank, num_ranks, ("127.0.0.1", port), timeout_s=30.0, silence_s=silence_s)
    try:
        everything = modules(dtype)
        stages = {stage: everything[stage] for stage in table.layout.stages_on(rank)}
        given = {"loss": loss if rank == 5 else None, **options}
        count = table.num_microbatches
        plant(wrong, rank, stages, given, everything)
        runner = PipelineRunner(table, rank, stages, transport, **given)
        losses: list[float] = []
        for iteration in range(iterations):
            mine = {s: inputs(s, count, dtype, iteration) for s in stages if s in HEADS}
            goals = targets(count, dtype) if rank == 5 else None
            if wrong["mistake"] == "no inputs" and rank == 0:
                mine = {}
            if wrong["mistake"] == "few inputs" and rank == 0:
                mine = {0: mine[0][:3]}
            if wrong["mistake"] == "few targets" and rank == 5:
                goals = goals[:3]
            result = runner.step(mine, goals)
            losses += [one.item() for one in result.losses]
        return losses, _gradients(stages)
    finally:
        transport.close()


def told_by_rank(rank: int, num_ranks: int, port: int, text: str, options: dict[str, Any]) -> tuple[str, float]:
    """What a rank says when it stops, and when (seconds, on the clock of this machine)."""
    try:
        run_rank(rank, num_ranks, port, text, options)
    except (LdtError, ScheduleError) as error:
        return str(error), time.monotonic()
    return "went well", time.monotonic()


def plant(
    wrong: dict[str, Any],
    rank: int,
    stages: dict[int, torch.nn.Module],
    given: dict[str, Any],
    everything: dict[int, torch.nn.Module],
) -> None:
    """Put in what is to go wrong on this rank."""
    if wrong["fail"] is not None and rank == wrong["fail"][0]:
        _when_called(stages, lambda: _raise(ValueError(wrong["fail"][1])))
    if wrong["kill"] == rank:
        _when_called(stages, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if wrong["wrong_gradient"] == rank:
        _send_a_row_too_many()
    if wrong["mistake"] == "no loss":
        given["loss"] = None
    if wrong["mistake"] == "other stages" and rank == 0:
        stages[3] = everything[3]
        del stages[0]
    if wrong["mistake"] == "loss of many" and rank == 5:
        given["loss"] = lambda output, _: output[:2] ** 2
    if wrong["mistake"] == "a number handed over" and rank == 4:
        stages[4].register_forward_hook(lambda *_: 1.0)
    if wrong["mistake"] == "rows that do not add up" and rank == 1:
        stages[1].register_forward_hook(lambda _, __, output: output.sum(0, keepdim=True))


def _raise(error: Exception) -> None:
    raise error


def _when_called(stages: dict[int, torch.nn.Module], what: Callable[[], None]) -> None:
    for module in stages.values():
        module.register_forward_pre_hook(lambda *_: what())


def _send_a_row_too_many() -> None:
    """What a runtime with a wrong split would do: the sender's gradient has another shape than the output had."""
    original = ModuleStages.backward

    def backward(self: ModuleStages, *args: Any) -> Any:
        return [[torch.cat([one, one[:1]]) for one in of_one if one is not None] for of_one in original(self, *args)]

    ModuleStages.backward = backward  # type: ignore[method-assign]
