"""What one of many processes says when something is wrong: the first of a site says it, the others leave quietly."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.errors import ScheduleError
from patches.manager import PatchError

USER_MISTAKE = 2


@contextmanager
def messages_of_this_process() -> Iterator[None]:
    """A user's mistake ends this process with exit code 2, on every process of both sites; one of each site tells it."""
    try:
        yield
    except (ConfigError, ScheduleError, PatchError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"ldt: {error}", file=sys.stderr, flush=True)
        raise SystemExit(USER_MISTAKE) from None
