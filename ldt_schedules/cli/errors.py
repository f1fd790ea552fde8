"""What a mistake looks like to the person who made it: one message, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.planning.errors import ScheduleError

USER_MISTAKE = 2
FAILURE = 1


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
        causes = []
        cause = error.__cause__
        while cause is not None:
            causes.append(f"\n  because of {type(cause).__name__}: {cause}")
            cause = cause.__cause__
        _leave(str(error) + "".join(causes), FAILURE)


def _leave(message: str, code: int) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"ldt: {message}\n")
    sys.stderr.flush()
    raise SystemExit(code)
