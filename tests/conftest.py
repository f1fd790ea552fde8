"""Fixtures of the whole suite."""

from __future__ import annotations

import pytest

from tests.helpers.workers import Workers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in tests/golden")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def workers() -> Workers:
    """Runs module-level functions as ranks, in processes that have torch and Megatron loaded."""
    return Workers()
