"""SIGSTOP: a process that is frozen for longer than the others wait, and one that is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.faults.injection import STOP, Fault
from tests.faults.suite import PROCESSES, STEP, Row, Weights, break_at, small
from tests.faults.worlds import run_until_ended, saved_weights
from tests.helpers.workers import Workers

PLACES = ((2, None), (11, None), (None, "gradient norms"))


@pytest.mark.parametrize("process", PROCESSES)
def test_frozen_for_longer_than_the_others_wait(
    workers: Workers, tmp_path: Path, unharmed: Weights, process: str, record_property: Row
) -> None:
    """The others name it; itself, once it is woken, it finds out and goes."""
    found = break_at(workers, tmp_path, process, STOP, PLACES, unharmed, within_s=5.0)
    found.require(f"SIGSTOP: {process}", record_property)


@pytest.mark.parametrize("process", PROCESSES)
def test_frozen_for_a_moment(tmp_path: Path, unharmed: Weights, process: str) -> None:
    """It goes on, and nothing has changed."""
    fault = Fault(STOP, process, STEP, 7, None, tmp_path / "at")
    ended = run_until_ended(small(tmp_path, "link.silence_s=10"), tmp_path, fault, wake_after_s=1.2)
    assert [one.code for one in ended] == [0, 0, 0], ended
    weights = saved_weights(tmp_path)
    assert set(weights) == set(unharmed) and all(np.array_equal(weights[name], unharmed[name]) for name in unharmed)
