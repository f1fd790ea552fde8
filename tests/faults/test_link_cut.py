"""The wire between two sites is cut: for a moment, and for good; then one site is started again before the other."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.namespaces import CLOUD_ADDRESS, Wire, wire
from tests.helpers.cli import ldt
from tests.training.checkpoint_runs import QUICKSTART, TINY

SILENCE_S = 8.0
PROCESSES = (("edge", 0), ("cloud", 0), ("cloud", 1))
SMALL = (
    *TINY,
    "train.iterations=70",
    "train.save_interval=10",
    "train.log_interval=1000",
    f"link.silence_s={SILENCE_S}",
    "link.quiet_s=1.5",
)


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return 0 if not path.exists() else sum(1 for line in path.read_text().splitlines() if "grad_norm" in line)


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["iteration"]: line["loss"] for line in lines if "grad_norm" in line}


def wait_for_steps(folder: Path, count: int, running: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 90
    while steps_done(folder) < count:
        assert time.monotonic() < deadline, f"{steps_done(folder)} of {count} steps were done"
        assert all(process.poll() is None for process in running), "a process has ended"
        time.sleep(0.05)


def start(joined: Wire, sites: tuple[str, ...], arguments: list[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    processes = {"edge": 1, "cloud": 2}
    return [
        joined.start(site, rank, processes[site], arguments, folder / f"{site}{rank}.log")
        for site, rank in PROCESSES
        if site in sites
    ]


def codes(running: list[subprocess.Popen[bytes]], within_s: float) -> list[int | None]:
    """Exit codes; None of one that did not end in time, and is ended."""
    deadline = time.monotonic() + within_s
    while any(process.poll() is None for process in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    found = [process.poll() for process in running]
    for process in running:
        process.kill()
        process.wait(10)
    return found


def test_a_wire_that_is_cut(tmp_path: Path) -> None:
    folder, whole = tmp_path / "cut", tmp_path / "whole"
    folder.mkdir()
    try:
        entered = wire()
        joined = entered.__enter__()
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"needs network namespaces (root, ip): {error}")
    try:
        arguments = [str(QUICKSTART), *SMALL, f"train.output_dir={folder}", f"link.address={CLOUD_ADDRESS}:29777"]
        running = start(joined, ("edge", "cloud"), arguments, folder)

        wait_for_steps(folder, 5, running)
        joined.cut()
        time.sleep(2.5)
        before = steps_done(folder)
        joined.join()
        wait_for_steps(folder, before + 20, running)

        joined.cut()
        cut = time.monotonic()
        assert codes(running, SILENCE_S + 5.0) == [1, 1, 1]
        assert time.monotonic() - cut > SILENCE_S / 2
        joined.join()
        said = {name: (folder / f"{name}.log").read_text() for name in ("edge0", "cloud0", "cloud1")}
        assert "nothing has been heard of cloud rank 0 for 8 s" in said["edge0"]
        assert all("nothing has been heard of edge rank 0 for 8 s" in said[name] for name in ("cloud0", "cloud1"))
        assert any(" waits " in text and "last heard from" in text for text in said.values())

        # The cloud comes back alone, and waits for the edge.
        again = start(joined, ("cloud",), [*arguments, "train.resume=auto"], folder)
        time.sleep(3)
        assert all(process.poll() is None for process in again)
        again += start(joined, ("edge",), [*arguments, "train.resume=auto"], folder)
        assert codes(again, 90) == [0, 0, 0], (folder / "edge0.log").read_text()[-2000:]
    finally:
        entered.__exit__(None, None, None)

    unharmed = ldt("train", QUICKSTART, *SMALL, f"train.output_dir={whole}")
    assert unharmed.returncode == 0, unharmed.stderr
    assert losses(folder) == losses(whole)
