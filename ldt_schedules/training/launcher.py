"""Starts every process of a run on this machine, and makes sure that none outlives it.

    launcher ──┬── edge rank 0      owns the terminal
               ├── edge rank 1..    output in  output_dir/logs/edge-rank1.log
               └── cloud rank 0..   output in  output_dir/logs/cloud-rank0.log, ...

Each child has a session of its own, so Ctrl-C reaches the launcher alone, which stops the others in order. When a
child fails, the rest gets a moment to say what it has to say, then SIGTERM, then SIGKILL; what the *first* one to fail
wrote is shown, because the others fail of its absence. Should the launcher itself be killed, the kernel kills the
children (Linux), or they notice within a second (`exit_with_launcher`).
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from ldt_schedules.comm.process_files import file_stem
from ldt_schedules.errors import ConfigError, LdtError

LAUNCHER_PID = "LDT_LAUNCHER_PID"
"""Environment variable of the children: the process that must be alive."""

SETTLE_S = 1.0  # after the first failure: the others print their side of it (which config keys differ, say)
TERMINATE_S = 4.0  # from SIGTERM to SIGKILL
TAIL_LINES = 20

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Child:
    """A process to start.

    Attributes:
        name: for messages and for its log file, `edge rank 0`.
        environment: set on top of the launcher's.
        owns_terminal: inherits standard output and error instead of writing to a log file.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    owns_terminal: bool = False


class ChildFailed(LdtError):
    """A child ended with another code than 0; `exit_code` is the one to end with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(LdtError):
    """A signal ended the run (Ctrl-C, a scheduler); `exit_code` is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; all processes were ended")
        self.exit_code = 128 + number


@dataclass
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    log: Path | None


def run_all(children: Sequence[Child], log_dir: str | Path) -> None:
    """Start the children and wait until all have ended well. Call from the main thread.

    Raises:
        ChildFailed: one failed; by then all have ended.
        Stopped: this process got SIGINT, SIGTERM or SIGHUP; by then all have ended.
        ConfigError: the log directory cannot be written.
    """
    log_dir = Path(log_dir)
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"log directory {log_dir} cannot be made: {error.strerror}") from None
    running: list[_Running] = []
    with _signals_as_exceptions():
        try:
            for child in children:
                running.append(_start(child, log_dir))
            failed = _first_failure(running)
            if failed is not None:
                _wait(running, SETTLE_S)
        finally:
            with _signals_ignored():
                _stop(running)
                _show_cursor()
    if failed is not None:
        raise _explained(*failed)


def _start(child: Child, log_dir: Path) -> _Running:
    log = None if child.owns_terminal else log_dir / f"{file_stem(child.name)}.log"
    environment = {**os.environ, **child.environment, LAUNCHER_PID: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    output: IO[bytes] | None = None if log is None else log.open("wb")
    try:
        process = subprocess.Popen(
            list(child.argv),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent(os.getpid()),
        )
    finally:
        if output is not None:
            output.close()
    return _Running(child, process, log)


def _die_with_parent(launcher: int) -> Callable[[], None] | None:
    """What a child does before its program: ask the kernel for SIGKILL when the launcher is gone. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # loaded here: between fork and exec as little as possible may happen

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it died before the line above
            os._exit(1)

    return ask_kernel


def exit_with_launcher(interval_s: float = 1.0) -> None:
    """In a child: end this process when the launcher is gone. For systems where the kernel cannot do it."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None or sys.platform.startswith("linux"):
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(interval_s)
        os._exit(1)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()


def _first_failure(running: Sequence[_Running]) -> tuple[_Running, int] | None:
    """Wait until all ended with 0 (None), or the first ends otherwise.

    A waiting thread for each child, not a polling loop: when one death causes others within milliseconds, the order
    of arrival tells which was first.
    """
    ended: queue.SimpleQueue[tuple[_Running, int]] = queue.SimpleQueue()
    for one in running:
        threading.Thread(target=lambda one=one: ended.put((one, one.process.wait())), daemon=True).start()
    for _ in running:
        one, code = ended.get()
        if code:
            return one, code
    return None


def _stop(running: Sequence[_Running]) -> None:
    for number, patience_s in ((signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, TERMINATE_S)):
        for one in running:
            if one.process.poll() is None:
                _signal_session(one.process, number)
        if _wait(running, patience_s):
            return


def _signal_session(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it ended a moment ago
        os.killpg(process.pid, number)  # its session, hence whatever it started


def _show_cursor() -> None:
    """A progress bar hides the terminal's cursor, and a process that was ended cannot bring it back."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")
        sys.stdout.flush()


def _wait(running: Sequence[_Running], patience_s: float) -> bool:
    """Have all ended, within `patience_s`?"""
    deadline = time.monotonic() + patience_s
    while any(one.process.poll() is None for one in running):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _explained(one: _Running, code: int) -> ChildFailed:
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        how += " (out of memory?)" if -code == signal.SIGKILL else ""
    else:
        how = f"failed with exit code {code}"
    # A signal is a failure at run time, 1; a child's own code says whether it was a user's mistake, 2.
    exit_code = code if code > 0 else 1
    if one.log is None:
        return ChildFailed(f"{one.child.name} {how}; what it said is above", exit_code)
    lines = one.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    said = "".join(f"\n  {line}" for line in lines) or "\n  (it wrote nothing)"
    return ChildFailed(f"{one.child.name} {how}; the end of {one.log}:{said}", exit_code)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handlers(stop):
        yield


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Inside, an impatient second Ctrl-C does not keep us from ending the children."""
    with _handlers(signal.SIG_IGN):
        yield


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    # A signal that was ignored from the start stays so: nohup and shell scripts with `&` rely on it.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
