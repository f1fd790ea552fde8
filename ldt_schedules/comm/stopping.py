"""What a process of a run does when it learns of the cause: say it, write down where it stands, and be gone.

Its main thread may be inside a collective that nobody will ever complete, where no exception reaches it; and what the
interpreter tidies up at its end may wait for the others, too. So a clock that needs no Python ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ldt_schedules.comm.cause import Cause
from ldt_schedules.comm.flight_recorder import FlightRecorder, record
from ldt_schedules.comm.ledger_file import LedgerFile
from ldt_schedules.comm.process_files import write_json
from ldt_schedules.comm.saying import say
from ldt_schedules.errors import FAILURE, USER_MISTAKE

_CONSEQUENCE_S = 0.5
"""For a main thread that fails at the same time, to say so."""
_LEDGER_EVERY_S = 10.0
_MISTAKE_S = 5.0
_OWN_FAILURE_S = 5.0
_NOTHING = open(os.devnull, "w")  # noqa: SIM115 - faulthandler writes to it when the process ends


@dataclass
class Stopping:
    """Of one process.

    Attributes:
        name: `cloud rank 1`.
        place: of the flight recorder's file: site, site_rank, pipeline_rank, processes.
        directory: for that file; None: none is written.
        quiet_s: after so long in one place a line says which.
        ledger: kept while the run goes on, and at a failure.
    """

    name: str
    place: dict[str, Any]
    flight: FlightRecorder
    directory: Path | None
    quiet_s: float
    ledger: LedgerFile | None = None
    _told: tuple[float, float] = field(default=(0.0, 0.0), init=False)
    _heard: dict[str, float] = field(default_factory=dict, init=False)
    _kept: float = field(default=0.0, init=False)

    def on_cause(self, cause: Cause) -> None:
        """Say it and write down what there is; this process leaves soon, unless the failure is its own main thread's."""
        own = cause.process == self.name and cause.error is not None
        leave_within(2 * _MISTAKE_S if cause.mistake else _OWN_FAILURE_S if own else 3 * _CONSEQUENCE_S)
        said = f"ldt: {self.name} stops, because {cause.text}"
        if not cause.mistake:
            say(said)
        self._write(cause)
        if own:
            return  # the main thread says what happened, and goes
        # A user's mistake is mostly found by both sites at once; then each says it in its own words, and goes.
        arguments = (said, USER_MISTAKE) if cause.mistake else (None, FAILURE)
        timer = threading.Timer(_MISTAKE_S if cause.mistake else _CONSEQUENCE_S, _leave, arguments)
        timer.daemon = True
        timer.start()

    def on_turn(self, heard: dict[str, float]) -> None:
        """In the watch's thread: has it been quiet for long?"""
        self._heard = heard
        if self.ledger is not None and time.monotonic() - self._kept > _LEDGER_EVERY_S:
            self._kept = time.monotonic()
            with contextlib.suppress(OSError):
                self.ledger.write()
        self._say_what_is_waited_for(heard)

    def _say_what_is_waited_for(self, heard: dict[str, float]) -> None:
        now = self.flight.now
        if now is None or not self.quiet_s:
            return
        waited = time.monotonic() - now.since
        since, next_s = self._told
        if since != now.since:
            self._told = since, next_s = now.since, self.quiet_s
        if waited < next_s:
            return
        self._told = now.since, 2 * next_s
        at = f"waits {waited:.0f} s for" if now.waits_for is not None else f"has been for {waited:.0f} s in"
        what = now.what if now.waits_for is None else now.waits_for
        others = {site: age for site, age in sorted(heard.items()) if site != self.place["site"]}
        ages = ", ".join(f"{site} {age:.0f} s ago" for site, age in others.items())
        step = f" (step {self.flight.step})" if self.flight.step >= 0 else ""
        say(f"ldt: {self.name} {at} `{what}`{step}; last heard from {ages or 'nobody'}")

    def _write(self, cause: Cause) -> None:
        if self.directory is None:
            return
        try:
            if self.ledger is not None:
                self.ledger.write()
            content = record(self.flight, process=self.name, place=self.place, cause=cause, last_heard_s=self._heard)
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory, self.name, content)
            say(f"  (what it did last: ldt doctor --post-mortem {self.directory})")
        except Exception as error:  # whatever it is, this process must go on to its end
            say(f"  (what it did last could not be written to {self.directory}: {error})")


def _leave(said: str | None, code: int) -> None:
    if said is not None:
        say(said)
    os._exit(code)


def leave_within(seconds: float) -> None:
    """End this process with exit code 1 then, whatever its threads are at."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=_NOTHING)


def leave_now(code: int) -> NoReturn:
    """End this process, without what the interpreter does at its end: that may wait for processes that have gone."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
