"""Which table a run executes: a planner's, or the user's own file."""

from __future__ import annotations

from dataclasses import replace

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.session import TableSource
from ldt_schedules.megatron.table_file import check_microbatches, read_table_file
from ldt_schedules.planning.budgets import within_budget
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.planners import PLAN_FOR_COSTS, plan, plan_problem
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.executor import check_executable
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.cost_model import problem_of


def table_source(config: TrainConfig) -> TableSource:
    """`(num_microbatches, forward_only) -> table` for the whole run; call it before anything expensive.

    Raises:
        ConfigError: the table file cannot be read, is not valid, or is for another run than this one.
    """
    layout = config.layout
    planner = config.schedule.planner
    problem = _costed(config) if planner in PLAN_FOR_COSTS else None
    if problem is not None:
        _check_planner(config, problem)
    own = None if config.schedule.table is None else _read(config.schedule.table, layout, config.num_microbatches)

    def table_for(num_microbatches: int, forward_only: bool) -> ScheduleTable:
        if own is not None and not forward_only and num_microbatches == own.num_microbatches:
            return own
        if problem is not None:
            return plan_problem(planner, replace(problem, num_microbatches=num_microbatches), forward_only)
        return plan(planner, layout, num_microbatches, forward_only=forward_only)

    return table_for


def _costed(config: TrainConfig) -> Problem:
    """The run's step with the costs of its shapes and hardware, within the memory it may use."""
    try:
        return within_budget(problem_of(config), config.schedule.memory)
    except ScheduleError as error:
        raise ConfigError(f"schedule.memory {config.schedule.memory!r}: {error}") from None


def _check_planner(config: TrainConfig, problem: Problem) -> None:
    """A planner may make what cannot be executed; one microbatch is enough to see it."""
    try:
        check_executable(plan_problem(config.schedule.planner, replace(problem, num_microbatches=1)))
    except ScheduleError as error:
        raise ConfigError(f"schedule.planner {config.schedule.planner}: {error}") from None


def _read(path: str, layout: Layout, num_microbatches: int) -> ScheduleTable:
    table = read_table_file(path, layout, "schedule.table", "sites.cloud.pipeline_ranks")
    check_microbatches(table, num_microbatches, path, "schedule.table", "train.global_batch_size")
    return table
