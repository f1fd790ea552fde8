"""Files of which every process of a run has one of its own: their names, and that they are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def file_stem(process: str) -> str:
    """Of `cloud rank 1`: `cloud-rank1`."""
    return process.replace(" rank ", "-rank")


def write_json(directory: Path, process: str, content: dict[str, Any]) -> Path:
    """Write a process's file. Raises OSError."""
    path = directory / f"{file_stem(process)}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(part, path)
    return path
