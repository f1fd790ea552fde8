"""Schedules as data: layouts, tables, planners, validation, simulation. The standard library only, no torch."""

from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.planning.costs import Costs, Link
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats import read_table, table_hash, write_table
from ldt_schedules.planning.layout import Layout, Stage
from ldt_schedules.planning.planners import PLANNERS, plan, plan_problem
from ldt_schedules.planning.problem import Problem
from ldt_schedules.planning.simulator import simulate
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.planning.timeline import Timeline
from ldt_schedules.planning.validator import check, validate
from ldt_schedules.planning.violation import Violation

__all__ = [
    "PLANNERS",
    "Action",
    "Costs",
    "Kind",
    "Layout",
    "Link",
    "Problem",
    "ScheduleError",
    "ScheduleTable",
    "Stage",
    "Timeline",
    "Violation",
    "check",
    "plan",
    "plan_problem",
    "read_table",
    "simulate",
    "table_hash",
    "validate",
    "write_table",
]
