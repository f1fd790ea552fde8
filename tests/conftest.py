"""Fixtures of the whole suite."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import fault_table
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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    fault_table.show(terminalreporter)
