"""Before a step: the edge reads its batches and says what the step is, the cloud checks that it is about to run the same."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch

from ldt_schedules import device
from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.megatron.session import Session
from ldt_schedules.planning.formats import table_hash
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.batches import SharedBatches
from ldt_schedules.runtime.step_header import StepHeader
from ldt_schedules.topology import Site


def header_of(run: Session, table: ScheduleTable, config: Any, seq_length: int, micro_batch_size: int) -> StepHeader:
    """Of the step that this process is about to run, as far as both sites know it."""
    shape = (seq_length, micro_batch_size, config.hidden_size)
    dtype = config.pipeline_dtype or config.params_dtype
    return StepHeader(
        step=run.steps,
        forward_only=table.forward_only,
        table_hash=table_hash(table),
        shapes=(shape,) * table.num_microbatches,
        dtype=str(dtype).removeprefix("torch."),
        agreed=run.agreed,
    )


def announce(run: Session, batches: SharedBatches, mine: StepHeader) -> StepHeader:
    """The edge announces the step, the cloud checks that it is about to run the same one.

    Raises:
        LdtError: another step, or the edge cannot read its batches: then all its replicas and the cloud are told so, and no
            more.
    """
    failed: Exception | None = None
    if run.place.site is Site.EDGE and run.microbatch_format is not None:
        try:
            drawn = batches.draw(mine.num_microbatches)
            mine = replace(mine, told=tuple(run.microbatch_format.told(batch) for batch in drawn))
        except Exception as error:
            failed = error
        mine = _of_all_replicas(mine, failed)
    header = StepHeader.from_message(run.from_edge("header", mine.to_message()))
    if header.failure is not None:
        # Nobody leaves, and takes the store along, before everybody has read. Who has lost the link has read, too.
        with contextlib.suppress(LdtError):
            run.link.wait_for_all()
    if failed is not None:
        raise failed
    header.require_agreement(mine)
    return header


def _of_all_replicas(mine: StepHeader, failed: Exception | None) -> StepHeader:
    """The header of an edge process, a failure if any process of the edge could not read its batches. A collective.

    Else the other replicas, and their clouds, would begin a step that can never be finished.
    """
    badness = 0 if failed is None else 1 if isinstance(failed, ConfigError) else 2
    worst = torch.tensor([badness], device=device.current_device())
    torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
    if not worst.item():
        return mine
    why = f"the edge could not read the batches of step {mine.step} and stopped; its own log says why"
    return replace(mine, failure=why, mistake=worst.item() == 1, told=None)
