"""Which tables a run executes: a planner's (`--ldt-schedule`), or the user's own (`--ldt-plan`). Read once, at start."""

from __future__ import annotations

from dataclasses import dataclass

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.table_file import check_microbatches, read_table_file
from ldt_schedules.megatron_lm.sites import Sites
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.planners import plan
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.executor import check_executable


@dataclass(frozen=True)
class Schedule:
    """The planner, and the user's own table for the number of microbatches that it is for."""

    planner: str
    layout: Layout
    own: ScheduleTable | None = None
    path: str = ""

    def table_for(self, num_microbatches: int, forward_only: bool) -> ScheduleTable:
        """The user's table where it fits, else the planner's. A `TableSource`."""
        if self.own is not None and not forward_only and num_microbatches == self.own.num_microbatches:
            return self.own
        return plan(self.planner, self.layout, num_microbatches, forward_only=forward_only)

    def check_step(self, num_microbatches: int) -> None:
        """Is the user's table that of a training step of so many microbatches?

        Raises:
            ConfigError: it is not.
        """
        if self.own is not None:
            check_microbatches(self.own, num_microbatches, self.path, "--ldt-plan", "--global-batch-size")


def schedule_of(sites: Sites) -> Schedule:
    """What the command line asks for, on the U with a cloud pipeline for each domain.

    Raises:
        ConfigError: a planner whose tables cannot be run, or a file that cannot be used.
    """
    flags = sites.flags
    layout = Layout.u(sites.topology.num_pipeline_ranks, sites.topology.domains)
    try:
        check_executable(plan(flags.schedule, layout, 1))
    except ScheduleError as error:
        raise ConfigError(f"--ldt-schedule {flags.schedule}: {error}") from None
    if flags.plan is None:
        return Schedule(flags.schedule, layout)
    own = read_table_file(flags.plan, layout, "--ldt-plan", "--pipeline-model-parallel-size")
    return Schedule(flags.schedule, layout, own, flags.plan)
