"""One rank that runs a table frozen and not, and counts what it sends. Beside `graphs`, whose stages these are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.formats import read_table
from ldt_schedules.runtime import PipelineRunner, connect_ranks
from tests.runtime import graphs

ABSENT = ((0, 1),)
"""(root, microbatch): nothing there."""


class SumOfPresent(graphs.Sum):
    """The sum of those inputs that are there."""

    def forward(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        return super().forward(*[one for one in inputs if one is not None])


@dataclass
class Outcome:
    """Of one rank: losses, gradients by stage, and what it sent, counted and in bytes, by (peer, SEND kind)."""

    losses: list[float]
    gradients: dict[int, np.ndarray | None]
    messages: Counter[int]
    sent_bytes: Counter[int]
    without_autograd: dict[int, bool]


def run_rank(rank: int, num_ranks: int, port: int, tables: list[str], absent: bool) -> list[Outcome]:
    """Every table in one world; modules of frozen stages train nothing."""
    outcomes = []
    with connect_ranks(rank, num_ranks, ("127.0.0.1", port), timeout_s=30) as transport:
        messages: Counter[int] = Counter()
        original = transport.post_send

        def counting(content: Any, spec: Any, /, *, peer: int, **rest: Any) -> Any:
            messages[peer] += 1
            return original(content, spec, peer=peer, **rest)

        transport.post_send = counting  # type: ignore[method-assign]
        for text in tables:
            messages.clear()
            transport.traffic.take()
            outcomes.append(_run(rank, text, transport, absent))
            outcomes[-1].messages = Counter(messages)
            outcomes[-1].sent_bytes = Counter(transport.traffic.sent)
    return outcomes


def _run(rank: int, text: str, transport: Any, absent: bool) -> Outcome:
    table = read_table(text)
    layout, count = table.layout, table.num_microbatches
    modules = {stage: SumOfPresent(stage) for stage in layout.stages_on(rank)}
    called: dict[int, bool] = {}
    for stage, module in modules.items():
        module.requires_grad_(not layout.stages[stage].frozen)
        module.register_forward_hook(
            lambda _, __, output, stage=stage: called.__setitem__(stage, not output.requires_grad)
        )
    has_tail = any(layout.is_tail(stage) for stage in modules)
    runner = PipelineRunner(table, rank, modules, transport, loss=graphs.loss if has_tail else None)
    mine = {stage: graphs.data(stage, count) for stage in modules if layout.is_head(stage)}
    for stage, m in ABSENT if absent else ():
        if stage in mine:
            mine[stage][m] = None
    losses = runner.step(mine, graphs.targets(count) if has_tail else None).losses
    gradients = {s: None if m.weight.grad is None else m.weight.grad.numpy() for s, m in modules.items()}
    return Outcome([one.item() for one in losses], gradients, Counter(), Counter(), called)


def told_by_rank(rank: int, num_ranks: int, port: int, text: str) -> str:
    """The mistake of modules that all train, whatever the table says."""
    with connect_ranks(rank, num_ranks, ("127.0.0.1", port), timeout_s=30) as transport:
        table = read_table(text)
        modules = {stage: graphs.Sum(stage) for stage in table.layout.stages_on(rank)}
        try:
            PipelineRunner(table, rank, modules, transport, loss=graphs.loss)
        except ConfigError as error:
            return f"ConfigError: {error}"
        except Exception as error:
            return str(error)
        return "no mistake"
