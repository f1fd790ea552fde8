"""The file that each process leaves behind when its run fails, `ldt-flight/1`: what it was at, and what it knew.

    {"format": "ldt-flight/1", "process": "cloud rank 1", "site": "cloud", "site_rank": 1, "pipeline_rank": 2, "processes": 3,
     "written_unix_s": 1.7e9, "own_failure": false, "cause": {"process": "edge rank 0", "text": "…", "step": 3, "index": 4,
     "action": "F s0 m1", "error": "ValueError"},
     "step": 3, "steps_applied": 3, "table": {ldt-table/1}, "done": 17,
     "now": {"what": "F s1 m0", "index": 17, "waits_for": "RECV_F s0 m0 <-0", "since_s": 41.2},
     "last_heard_s": {"edge": 3.1, "cloud": 0.2}, "events": [[1.7e9, 3, "F s1 m0", "begin"]], "stack": ["loop.py:213 step"]}

It is read when something went wrong, perhaps with the disk as well: a file that is not as it should be is an error with
its name and its mistake. Keys that are not known here are let pass, so that a newer run can be read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldt_schedules.comm.flight_recorder import FORMAT
from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats import json_format
from ldt_schedules.planning.table import ScheduleTable


class DamagedFile(ConfigError):
    """A flight file that cannot be used; the message says why, without its name."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class FlightCause(_Part):
    """Why the run stopped, as the process that failed first said it to all."""

    text: str
    process: str | None = None
    step: int | None = None
    index: int | None = Field(None, ge=0)
    action: str | None = None
    error: str | None = None


class FlightNow(_Part):
    """What a process was at; `since_s` before it wrote its file. `index` is None for what is no action of the table."""

    what: str
    index: int | None = Field(None, ge=0)
    waits_for: str | None = None
    since_s: float = 0.0


class FlightFile(_Part):
    """Of one process.

    Attributes:
        processes: of the whole run.
        step: -1 before the first.
        done: actions of its row that it had finished in this step.
        last_heard_s: for each site, how long ago it heard of it.
    """

    format: str
    process: str
    site: Literal["edge", "cloud"]
    site_rank: int = Field(ge=0)
    pipeline_rank: int = Field(ge=0)
    processes: int = Field(ge=1)
    written_unix_s: float
    cause: FlightCause | None = None
    own_failure: bool = False
    step: int
    steps_applied: int
    table: dict[str, Any] | None = None
    done: int = Field(ge=0)
    now: FlightNow | None = None
    last_heard_s: dict[str, float | None] = {}
    events: list[tuple[float, int, str, Literal["begin", "end"]]] = []
    stack: list[str] = []

    def schedule(self) -> ScheduleTable | None:
        """The table of its step. Raises DamagedFile."""
        if self.table is None:
            return None
        try:
            return json_format.loads(json.dumps(self.table))
        except ScheduleError as error:
            raise DamagedFile(f'its "table" cannot be read: {error}') from None


def read_flight_file(path: Path) -> FlightFile:
    """Raises DamagedFile."""
    try:
        return parse_flight_file(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedFile(f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DamagedFile("it is no text") from None


def parse_flight_file(text: str) -> FlightFile:
    """Raises DamagedFile."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"it is cut off or no JSON ({str(error)[:100]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise DamagedFile(f'it is no flight file: "format" is {str(found)[:40]!r}, expected "{FORMAT}"')
    try:
        flight = FlightFile.model_validate_json(text)
    except ValidationError as error:
        raise DamagedFile("; ".join(_in_words(dict(one)) for one in error.errors()[:3])) from None
    flight.schedule()
    return flight


def _in_words(finding: dict[str, Any]) -> str:
    key = ".".join(map(str, finding["loc"]))
    if finding["type"] == "missing":
        return f'"{key}" is missing'
    return f'"{key}" is {str(finding["input"])[:40]!r}: {finding["msg"]}'
