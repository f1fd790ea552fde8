"""What a mistake looks like to the person who made it: one message, exit code 2, no traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ldt_schedules.comm.cause import Aborted
from ldt_schedules.errors import FAILURE, USER_MISTAKE, ConfigError, LdtError
from ldt_schedules.planning.errors import ScheduleError

_LATER_S = 3.0


@contextmanager
def messages_for_people() -> Iterator[None]:
    """Turn what the user can mend into a message and exit code 2, what failed at run time into one and exit code 1.

    Anything else is a defect of ours and keeps its traceback.
    """
    try:
        yield
    except (ConfigError, ScheduleError) as error:
        _leave(str(error), USER_MISTAKE)
    except LdtError as error:
        # Of one that comes from another process's failure, what happened here is the consequence.
        word = "here, as a consequence:" if isinstance(error, Aborted) else "because of"
        causes = []
        cause = error.__cause__
        while cause is not None:
            causes.append(f"\n  {word} {type(cause).__name__}: {cause}")
            cause = cause.__cause__
        mistaken = isinstance(error, Aborted) and error.cause.mistake
        _leave(str(error) + "".join(causes), USER_MISTAKE if mistaken else FAILURE)


@contextmanager
def messages_of_one_of_many() -> Iterator[None]:
    """The same for a user's mistake in one of a launcher's processes, which all find it: the first of them tells it."""
    try:
        yield
    except (ConfigError, ScheduleError) as error:
        if os.environ.get("RANK", "0") == "0":
            _leave(str(error), USER_MISTAKE)
        # A launcher ends all when one has ended; the one that tells must be it.
        time.sleep(_LATER_S)
        raise SystemExit(USER_MISTAKE) from None


def _leave(message: str, code: int) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"ldt: {message}\n")
    sys.stderr.flush()
    raise SystemExit(code)
