"""How a reader is fuzzed: the same inputs on every machine, named errors alone, an end to everything."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, currently_in_test_context, note, settings
from hypothesis import strategies as st

from ldt_schedules.errors import LdtError
from ldt_schedules.planning.errors import ScheduleError

NAMED = (LdtError, ScheduleError)
"""ConfigError is an LdtError."""
_HANGS_AFTER_S = 20
_MOST_WORDS = 50_000

_Content = TypeVar("_Content")

seeds = st.integers(0, 2**63)
"""One number an input: drawing each step of a mutation from hypothesis costs more time than the readers take."""


def inputs(count: int) -> settings:
    """So many, always the same ones. What fails is printed as it is: a smaller seed is no simpler input."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


def show(given: object) -> None:
    """Print the input, should the test fail."""
    if currently_in_test_context():
        note(repr(given)[:4000])


def read(reader: Callable[..., _Content], *given: Any) -> _Content | None:
    """What the reader makes of an input; None where it refuses it by a named error, in a message of readable length."""
    try:
        with _deadline():
            return reader(*given)
    except NAMED as error:
        assert str(error).strip(), "an error without a word"
        assert len(str(error)) < _MOST_WORDS, f"an error of {len(str(error))} characters"
        return None


@contextmanager
def _deadline() -> Iterator[None]:
    """A hang is an error here, not a test run that somebody has to end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise AssertionError(f"no end after {_HANGS_AFTER_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _HANGS_AFTER_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
