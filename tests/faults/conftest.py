"""What the faults are compared with."""

from __future__ import annotations

import numpy as np
import pytest

from tests.faults.suite import reference


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Every weight at the end of a run without a fault, by process and name."""
    return reference(tmp_path_factory.mktemp("unharmed") / "run")
