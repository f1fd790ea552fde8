"""A schedule table that a user names by its file, instead of a planner."""

from __future__ import annotations

from pathlib import Path

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats import read_table
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.planning.validator import check
from ldt_schedules.runtime.executor import check_executable


def read_table_file(path: str, layout: Layout, option: str, size_option: str) -> ScheduleTable:
    """The training table in `path`, valid and executable, for this layout.

    Args:
        option, size_option: what the user's options for the table and for the number of pipeline ranks are called.

    Raises:
        ConfigError: the file cannot be read, is not valid, or is for another layout.
    """
    try:
        table = read_table(Path(path).read_text(encoding="utf-8"))
        check(table)
        check_executable(table)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read: {error}") from None
    except ScheduleError as error:
        raise ConfigError(f"{option} {path}: {error}") from None
    if not table.layout.same_work(layout):
        backwards = [[s.name for s in one.stages if not one.has_backward(s.index)] for one in (table.layout, layout)]
        if backwards[0] != backwards[1]:
            theirs, ours = (", ".join(names) or "none" for names in backwards)
            raise ConfigError(
                f"{option} {path} has no backward for the stages {theirs}, this run for {ours} (what is frozen); plan it for "
                "the same frozen parts"
            )
        raise ConfigError(
            f"{option} {path} is for {table.layout.num_ranks} pipeline ranks and "
            f"{len(table.layout.stages)} stages, this run has {layout.num_ranks} and {len(layout.stages)}; "
            f"change the table or {size_option}"
        )
    return table


def check_microbatches(table: ScheduleTable, num_microbatches: int, path: str, option: str, size_option: str) -> None:
    """Is it the table of this run's training step?

    Raises:
        ConfigError: it evaluates, or has another number of microbatches.
    """
    if table.num_microbatches != num_microbatches or table.forward_only:
        kind = "evaluates" if table.forward_only else "trains"
        raise ConfigError(
            f"{option} {path} {kind} {table.num_microbatches} microbatches, a training step of this run has "
            f"{num_microbatches}; change the table or {size_option}"
        )
