"""The command line as users run it: a process, its screen, its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def ldt(*arguments, cwd=None):
    """Run `ldt` with these arguments; the finished process with its output as text."""
    return subprocess.run(
        [sys.executable, "-m", "ldt_schedules", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=100,
    )


def start_training(config, *arguments, environment=None):
    """`ldt train` in a process of its own, which `finish` waits for."""
    return subprocess.Popen(
        [sys.executable, "-m", "ldt_schedules", "train", str(config), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )


def finish(process):
    """Its exit code, what it printed, what it said beside."""
    out, err = process.communicate(timeout=150)
    return process.returncode, out, err


def metrics(directory):
    """The lines that a run has written, in order."""
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
