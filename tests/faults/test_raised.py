"""An exception at every action of every process, and at everything else of a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.faults.injection import RAISE
from tests.faults.suite import PROCESSES, break_everywhere, reference
from tests.helpers.workers import Workers


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return reference(tmp_path_factory.mktemp("raised") / "reference")


@pytest.mark.parametrize("process", PROCESSES)
def test_others_stop_and_a_resumed_run_ends_the_same(
    workers: Workers,
    tmp_path: Path,
    unharmed: dict[str, np.ndarray],
    process: str,
    record_property: pytest.RecordProperty,
) -> None:
    found = break_everywhere(workers, tmp_path, process, RAISE, unharmed, within_s=2.0)
    record_property("faults", {"fault": f"exception in {process}", **found.row()})
    assert not found.problems, "\n".join(found.problems)
