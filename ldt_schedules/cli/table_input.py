"""A table from a file, or from a planner and two numbers: what several verbs take."""

from __future__ import annotations

from pathlib import Path

from ldt_schedules.cli.files import reading
from ldt_schedules.errors import ConfigError
from ldt_schedules.planning import Layout, ScheduleTable, plan, read_table


def read(path: Path) -> ScheduleTable:
    """Raises ConfigError or ScheduleError, the file named, when there is no readable table."""
    return reading(path, read_table, "a table as JSON, CSV or a grid")


def read_or_plan(
    path: Path | None, ranks: int | None, microbatches: int | None, schedule: str, forward_only: bool = False
) -> ScheduleTable:
    """The file's table, or a planned one."""
    if path is not None:
        if ranks is not None or microbatches is not None:
            raise ConfigError("give a file, or --ranks and --microbatches, not both")
        return read(path)
    if ranks is None or microbatches is None:
        raise ConfigError("give a table's file, or --ranks and --microbatches, for example --ranks 3 --microbatches 6")
    return plan(schedule, Layout.u(ranks), microbatches, forward_only=forward_only)
