"""A small model with three roots, and the same in one process: linear heads of different widths, rows that vary.

audio [a, 5] ─┐
vision [v, 7] ─┼─► join: rows one after the other ─► middle ─► last ─► mean of squares against a target
text [t, 3] ──┘
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ldt_schedules.comm.ranks import connect_ranks
from ldt_schedules.planning.formats import grid
from ldt_schedules.runtime import PipelineRunner

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
    """One process of the pipeline. `options`: dtype, iterations, and what `PipelineRunner` takes."""
    options = dict(options)
    dtype, iterations = options.pop("dtype", torch.float64), options.pop("iterations", 1)
    fail = options.pop("fail", None)
    table = grid.loads(text)
    transport = connect_ranks(rank, num_ranks, ("127.0.0.1", port), timeout_s=options.pop("timeout_s", 30.0))
    try:
        everything = modules(dtype)
        stages = {stage: everything[stage] for stage in table.layout.stages_on(rank)}
        if fail is not None and rank == fail[0]:
            fail_when(stages, fail)
        runner = PipelineRunner(table, rank, stages, transport, loss=loss if rank == 5 else None, **options)
        losses: list[float] = []
        for iteration in range(iterations):
            mine = {s: inputs(s, table.num_microbatches, dtype, iteration) for s in stages if s in HEADS}
            result = runner.step(mine, targets(table.num_microbatches, dtype) if rank == 5 else None)
            losses += [float(one) for one in result.losses]
        return losses, _gradients(stages)
    finally:
        transport.close()


def fail_when(stages: dict[int, torch.nn.Module], fail: tuple[int, str]) -> None:
    """Make the rank's module raise the text, in its first forward."""

    def hook(*_: object) -> None:
        raise ValueError(fail[1])

    for module in stages.values():
        module.register_forward_pre_hook(hook)
