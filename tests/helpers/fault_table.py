"""A table of what injected faults have shown, at the end of the tests.

A test gives its row with `record_property("faults", row)`, which comes here from whichever process ran it.
"""

from __future__ import annotations

from typing import Any

import pytest


def show(terminalreporter: Any) -> None:
    rows = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, value in report.user_properties
        if name == "faults"
    ]
    if not rows:
        return
    terminalreporter.section("faults")
    terminalreporter.line(f"{'fault':32} {'injected':>8} {'others gone: median':>20} {'slowest':>8} {'problems':>8}")
    for row in sorted(rows, key=lambda row: str(row["fault"])):
        terminalreporter.line(
            f"{row['fault']:32} {row['faults']:8} {row['median_s']:18.2f} s {row['slowest_s']:6.2f} s {row['problems']:8}"
        )
    total, slowest = sum(row["faults"] for row in rows), max(row["slowest_s"] for row in rows)
    terminalreporter.line(f"{'all':32} {total:8} {'':20} {slowest:6.2f} s {sum(row['problems'] for row in rows):8}")
