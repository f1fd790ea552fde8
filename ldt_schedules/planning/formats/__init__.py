"""Files of schedule tables. Text in, text out: reading and writing files is the caller's."""

from __future__ import annotations

from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats import grid, json_format, torch_csv
from ldt_schedules.planning.formats.json_format import table_hash
from ldt_schedules.planning.table import ScheduleTable

__all__ = ["FORMATS", "read_table", "table_hash", "write_table"]

FORMATS = {"json": json_format.dumps, "grid": grid.dumps, "csv": torch_csv.dumps}


def read_table(text: str) -> ScheduleTable:
    """Read JSON, a grid or the CSV of torch.distributed.pipelining, whichever it is.

    Raises:
        ScheduleError: it is none of them, or a broken one.
    """
    beginning = text.lstrip()
    if beginning.startswith("{"):
        return json_format.loads(text)
    if beginning.startswith("Rank "):
        return grid.loads(text)
    if torch_csv.is_csv(text):
        return torch_csv.loads(text)
    if not beginning:
        raise ScheduleError("the file is empty; expected a table as JSON ('{…'), a grid ('Rank 0 …') or CSV ('0F0,…')")
    raise ScheduleError(
        f"this is no table: it begins with {beginning[:20]!r}; expected JSON ('{{…'), a grid ('Rank 0 …') or "
        "CSV ('0F0,…')"
    )


def write_table(table: ScheduleTable, format_name: str) -> str:
    """The table in one of `FORMATS`.

    Raises:
        ScheduleError: no such format.
    """
    if format_name not in FORMATS:
        raise ScheduleError(f"there is no format {format_name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[format_name](table)
