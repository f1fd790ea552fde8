"""SIGKILL at every action of every process, and at everything else of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.injection import KILL
from tests.faults.suite import PROCESSES, Row, Weights, break_at, places
from tests.helpers.workers import Workers


@pytest.mark.parametrize("process", PROCESSES)
def test_others_stop_and_a_resumed_run_ends_the_same(
    workers: Workers, tmp_path: Path, unharmed: Weights, process: str, record_property: Row
) -> None:
    found = break_at(workers, tmp_path, process, KILL, list(places(process)), unharmed, within_s=2.0)
    found.require(f"SIGKILL: {process}", record_property)
