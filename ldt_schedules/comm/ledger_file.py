"""Keeps a process's ledger in a file, one entry for each start of the run, also of the starts before this one."""

from __future__ import annotations

import json
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldt_schedules.comm.gate import FORMAT, Ledger
from ldt_schedules.comm.process_files import file_stem, write_json
from ldt_schedules.errors import ConfigError


@dataclass
class LedgerFile:
    """Of one process.

    Attributes:
        process: its name, `cloud rank 1`.
        run: the same in all processes of a start, and in no other start.
        members: names of all processes.
    """

    directory: Path
    process: str
    site: str
    run: str
    members: tuple[str, ...]
    ledger: Ledger
    _before: list[dict[str, Any]] = field(default_factory=list, init=False)
    _begun_unix_s: float = field(default_factory=time.time, init=False)
    _complete: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        """Raises ConfigError where the directory cannot be written, or has a file that is no ledger."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._before = read_ledger(self.path)["starts"]
            self.write()
        except OSError as error:
            raise ConfigError(f"the ledger {self.path} cannot be written: {error.strerror}") from None

    @property
    def path(self) -> Path:
        return self.directory / f"{file_stem(self.process)}.json"

    def write(self) -> None:
        """All that has crossed until now; whole or not at all."""
        now = {
            "run": self.run,
            "members": self.members,
            "complete": self._complete,
            "begun_unix_s": self._begun_unix_s,
            "written_unix_s": time.time(),
            **self.ledger.content(),
        }
        content = {"format": FORMAT, "process": self.process, "site": self.site, "starts": [*self._before, now]}
        with self._lock:  # the watch's thread writes, too
            write_json(self.directory, self.process, content)

    def close(self, complete: bool) -> None:
        """The last entry: has the run come to its end? A disk that is full now does not spoil that."""
        self._complete = complete
        try:
            self.write()
        except OSError as error:
            warnings.warn(f"the ledger {self.path} could not be written to its end: {error.strerror}", stacklevel=2)


def read_ledger(path: Path) -> dict[str, Any]:
    """Raises ConfigError: it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no ledger: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("starts"), list):
        raise ConfigError(f"{path} is no ledger (format {FORMAT})")
    return content
