"""What a rank of the Omni example does in a test. A module of its own: importing transformers takes seconds in each process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from examples.omni import pipeline
from ldt_schedules.comm.message_transport import MessageTransport
from ldt_schedules.comm.ranks import connect_ranks
from ldt_schedules.planning import read_table

DIRECTORY = Path(pipeline.__file__).parent


class Case(NamedTuple):
    """One step of a table on fresh weights."""

    table: str
    dtype: torch.dtype
    blocking: bool
    step: int = 0

    def __str__(self) -> str:
        semantics = "blocking" if self.blocking else "posted"
        return f"{self.table}-{str(self.dtype).removeprefix('torch.')}-{semantics}-step{self.step}"


class Outcome(NamedTuple):
    """Of one rank: losses of the microbatches (none without the tail), gradients by name in the whole model."""

    losses: list[float]
    gradients: dict[str, np.ndarray | None]


def run_rank(rank: int, num_ranks: int, port: int, cases: list[Case]) -> list[Outcome]:
    """One process of the pipeline. All cases run on one transport, one after the other."""
    transport = connect_ranks(rank, num_ranks, ("127.0.0.1", port), timeout_s=60)
    try:
        return [_run(case, rank, transport) for case in cases]
    finally:
        transport.close()


def _run(case: Case, rank: int, transport: MessageTransport) -> Outcome:
    table = read_table((DIRECTORY / case.table).read_text(encoding="utf-8"))
    options = pipeline.Options(table, dtype=case.dtype, blocking=case.blocking)
    one = pipeline.OmniRank(options, rank, transport)
    result = one.forward_backward(pipeline.microbatches(case.step, table.num_microbatches))
    gradients = {name: None if found is None else found.numpy() for name, found in one.gradients().items()}
    return Outcome([float(loss) for loss in result.losses], gradients)
