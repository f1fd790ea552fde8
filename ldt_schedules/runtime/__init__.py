"""Executes one row of a schedule table: torch only, no Megatron.

executor.py          one handler for each kind of action; what a stage computes is somebody else's
pipeline_runner.py   for plain torch modules: `PipelineRunner`, as in torch.distributed.pipelining but with the table itself
"""

from __future__ import annotations

from ldt_schedules.comm.ranks import connect_ranks
from ldt_schedules.runtime.module_stages import PipelineStage
from ldt_schedules.runtime.packing import Packing, Rows
from ldt_schedules.runtime.pipeline_runner import PipelineRunner, StepResult

__all__ = ["Packing", "PipelineRunner", "PipelineStage", "Rows", "StepResult", "connect_ranks"]
