"""Puts the ledgers of all processes of a run together: what crossed, and whether it is what the plan says, to the byte.

For each start of the run three accounts of the tensors must agree: what the senders counted at their gates, what the
receivers counted, and what schedule table and step headers say by arithmetic alone (`crossing_plan.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ldt_schedules.comm.crossing_plan import Count, Direction
from ldt_schedules.comm.declared import MESSAGES, SCALARS
from ldt_schedules.comm.gate import TENSORS
from ldt_schedules.comm.ledger_file import read_ledger
from ldt_schedules.errors import ConfigError
from ldt_schedules.topology import Site


@dataclass(frozen=True)
class Row:
    """One kind of what crossed in one direction; `planned` and `received` are of tensors alone."""

    kind: str
    direction: Direction
    sent: Count
    received: Count | None = None
    planned: Count | None = None

    @property
    def agrees(self) -> bool:
        return all(other is None or other == self.sent for other in (self.received, self.planned))

    @property
    def exceeds(self) -> bool:
        """Did more leave, or arrive, than was planned?"""
        if self.planned is None:
            return False
        return any(
            count.messages > self.planned.messages or count.num_bytes > self.planned.num_bytes
            for count in (self.sent, self.received or self.sent)
        )


class Verdict(str, Enum):
    """EQUAL: all accounts agree. WITHIN: nobody counted more than was planned, and the run did not come to its end.

    DIFFERENT: it did, and they do not agree. MORE: somebody counted more. UNKNOWN: ledgers are missing.
    """

    EQUAL = "equal"
    WITHIN = "within"
    DIFFERENT = "different"
    MORE = "more"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class StartAudit:
    """Of one start of the run.

    Attributes:
        rows: tensors first.
        missing: processes whose ledger has no entry of this start.
        complete: every process came to the end of the run.
        steps: forward-backward calls.
    """

    run: str
    begun_unix_s: float
    steps: int
    rows: tuple[Row, ...]
    missing: tuple[str, ...] = field(default=())
    complete: bool = True

    @property
    def verdict(self) -> Verdict:
        if self.missing:
            return Verdict.UNKNOWN
        if any(row.exceeds for row in self.rows):
            return Verdict.MORE
        if all(row.agrees for row in self.rows):
            return Verdict.EQUAL
        return Verdict.DIFFERENT if self.complete else Verdict.WITHIN

    @property
    def proven(self) -> bool:
        """No more crossed than was planned, by the account of every process."""
        return self.verdict in (Verdict.EQUAL, Verdict.WITHIN)

    def total(self, direction: Direction) -> int:
        """Bytes of everything that went there."""
        return sum(row.sent.num_bytes for row in self.rows if row.direction == direction)


def audit(directory: Path) -> list[StartAudit]:
    """Every start of the run that left its ledgers in `directory` (or in `directory/ledger`), the first one first.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    folder = directory / "ledger" if (directory / "ledger").is_dir() else directory
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ConfigError(f"{directory} has no ledgers; give the directory of a run (train.output_dir, --ldt-run-dir)")
    ledgers = [read_ledger(path) for path in paths]
    by_run: dict[str, dict[str, dict[str, Any]]] = {}
    for ledger in ledgers:
        for start in ledger["starts"]:
            by_run.setdefault(start["run"], {})[ledger["process"]] = {**start, "site": ledger["site"]}
    found = [_audited(run, starts) for run, starts in by_run.items()]
    return sorted(found, key=lambda one: one.begun_unix_s)


def _audited(run: str, starts: dict[str, dict[str, Any]]) -> StartAudit:
    members = {name: None for start in starts.values() for name in start["members"]}
    return StartAudit(
        run,
        min(start["begun_unix_s"] for start in starts.values()),
        max(start["steps"] for start in starts.values()),
        tuple(_rows(list(starts.values()))),
        tuple(name for name in members if name not in starts),
        all(start["complete"] for start in starts.values()),
    )


def _rows(starts: list[dict[str, Any]]) -> Iterator[Row]:
    for direction in Direction:
        for kind in TENSORS:
            yield Row(
                kind,
                direction,
                _sum(starts, direction.sender, "sent", kind),
                _sum(starts, direction.receiver, "received", kind),
                _sum(starts, direction.sender, "planned_sent", kind),
            )
    for direction in Direction:
        for kind in (SCALARS, *MESSAGES):
            sent = _sum(starts, direction.sender, "sent", kind)
            if sent.messages:
                yield Row(kind, direction, sent)


def _sum(starts: list[dict[str, Any]], site: Site, account: str, kind: str) -> Count:
    total = Count()
    for start in starts:
        if start["site"] == str(site):
            count = start[account].get(kind, {})
            total.add(int(count.get("num_bytes", 0)), int(count.get("messages", 0)))
    return total
