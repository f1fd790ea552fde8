"""What reads files and messages must not eat the machine: a limit on memory around every test of this folder."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

_MORE_BYTES = 2 << 30
"""Above what the process has when a test begins: torch is in it, and threads reserve some."""


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Room that an input asks for beyond the limit is a MemoryError, which no reader may raise."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MORE_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
