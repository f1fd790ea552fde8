"""Any graph of stages on any ranks, against one process: a stage is tanh of a matrix times the sum of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ldt_schedules.planning import Layout, Stage, plan, write_table
from ldt_schedules.planning.formats import read_table
from ldt_schedules.runtime import PipelineRunner, connect_ranks

WIDTH, ROWS = 4, 3


def _graph(*stages: tuple[int, tuple[int, ...]]) -> Layout:
    return Layout(tuple(Stage(i, f"stage{i}", (rank,), inputs) for i, (rank, inputs) in enumerate(stages)))


LAYOUTS = {
    2: (
        Layout.u(2),
        Layout.laps(2, 2),
        Layout.roots({"audio": 0, "vision": 0}, {"head": 0, "cloud": 1, "tail": 0}),
        # Two consumers, one of them at home; two messages between the same ranks.
        _graph((0, ()), (1, (0,)), (0, (0,)), (1, (1, 2))),
        _graph((0, ()), (0, ()), (1, (0, 1)), (1, (0, 2)), (0, (3, 1))),
    ),
    3: (
        Layout.u(3),
        Layout.roots({"audio": 0, "vision": 1}, {"join": 2, "middle": 1, "last": 0}),
        # An output that skips a stage, and one that three stages read.
        _graph((0, ()), (1, (0,)), (2, (0, 1)), (0, (0, 2)), (1, (3, 1))),
    ),
    4: (
        Layout.u(4),
        _graph((0, ()), (1, (0,)), (2, (0,)), (3, (1, 2))),
        _graph((0, ()), (1, ()), (2, (0, 1)), (3, (0, 2)), (1, (2, 3)), (0, (4, 1))),
    ),
}


@dataclass(frozen=True)
class Case:
    """A planned table of one of the layouts, as text, so that every rank reads the same."""

    table: str
    blocking: bool = False


def cases(num_ranks: int) -> list[Case]:
    """Each layout, several planners and numbers of microbatches, and an evaluation."""
    found = []
    for layout in LAYOUTS[num_ranks]:
        for planner, microbatches in (("gpipe", 1), ("gpipe", 3), ("one_f_one_b", 5), ("auto", 4)):
            found.append(Case(write_table(plan(planner, layout, microbatches), "json")))
        found.append(Case(write_table(plan("gpipe", layout, 3, forward_only=True), "json")))
    return found


class Sum(torch.nn.Module):
    """`[rows, width]` in and out, however many inputs there are."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(stage)
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        total = inputs[0]
        for one in inputs[1:]:
            total = total + one
        return torch.tanh(total @ self.weight)


def data(stage: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + stage)
    return [torch.randn(ROWS + m, WIDTH, generator=generator, dtype=torch.float64) for m in range(count)]


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).sum()


def targets(count: int) -> list[torch.Tensor]:
    return [torch.full((WIDTH,), 0.1 * m, dtype=torch.float64) for m in range(count)]


Outcome = tuple[list[float], dict[int, "np.ndarray | None"]]


def make_runners_only(rank: int, num_ranks: int, port: int, given: list[Case]) -> int:
    """How many runners agreed on their tables, one after the other on one transport, none of them run."""
    with connect_ranks(rank, num_ranks, ("127.0.0.1", port), timeout_s=30) as transport:
        made = []
        for case in given:
            table = read_table(case.table)
            modules = {stage: Sum(stage) for stage in table.layout.stages_on(rank)}
            made.append(PipelineRunner(table, rank, modules, transport, loss=loss))
        return len(made)


def run_rank(rank: int, num_ranks: int, port: int, given: list[Case]) -> list[Outcome]:
    """Every case in one world, one runner after the other on one transport."""
    outcomes: list[Outcome] = []
    with connect_ranks(rank, num_ranks, ("127.0.0.1", port), timeout_s=30) as transport:
        for case in given:
            table = read_table(case.table)
            layout, count = table.layout, table.num_microbatches
            modules = {stage: Sum(stage) for stage in layout.stages_on(rank)}
            has_tail = any(layout.is_tail(stage) for stage in modules)
            runner = PipelineRunner(table, rank, modules, transport, loss=loss if has_tail else None)
            mine = {stage: data(stage, count) for stage in modules if layout.is_head(stage)}
            losses = runner.step(mine, targets(count) if has_tail else None).losses
            gradients = {s: None if m.weight.grad is None else m.weight.grad.numpy() for s, m in modules.items()}
            outcomes.append(([one.item() for one in losses], gradients))
    return outcomes


def one_process(case: Case) -> Outcome:
    """By autograd alone, microbatch after microbatch."""
    table = read_table(case.table)
    layout, count = table.layout, table.num_microbatches
    modules = {stage.index: Sum(stage.index) for stage in layout.stages}
    losses = []
    for m in range(count):
        outputs: dict[int, torch.Tensor] = {}
        for stage in layout.forward_order:
            inputs = [outputs[source] for source in layout.inputs(stage)] or [data(stage, count)[m]]
            outputs[stage] = modules[stage](*inputs)
        (tail,) = (stage for stage in outputs if layout.is_tail(stage))
        one = loss(outputs[tail], targets(count)[m])
        losses.append(one.item())
        if not table.forward_only:
            (one / count).backward()
    return losses, {s: None if one.weight.grad is None else one.weight.grad.numpy() for s, one in modules.items()}
