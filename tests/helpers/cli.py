"""The command line as users run it: a process, its screen, its exit code."""

from __future__ import annotations

import subprocess
import sys


def ldt(*arguments, cwd=None):
    """Run `ldt` with these arguments; the finished process with its output as text."""
    return subprocess.run(
        [sys.executable, "-m", "ldt_schedules", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=100,
    )
