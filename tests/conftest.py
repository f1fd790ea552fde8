"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.workers import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Processes that have torch and Megatron loaded and run module-level functions as ranks."""
    pool = Workers()
    yield pool
    pool.stop()
