"""`ldt audit`: what crossed between the sites of a run, and whether it is what the plan says, to the byte."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldt_schedules.errors import FAILURE

if TYPE_CHECKING:
    from rich.table import Table

    from ldt_schedules.runtime.audit import Row, StartAudit

_RunDir = Annotated[
    Path,
    typer.Argument(metavar="RUN_DIR", help="train.output_dir (--ldt-run-dir) with the ledgers of all processes."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with the figures.")]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("audit")(audit)


def audit(run_dir: _RunDir, json_output: _Json = False) -> None:
    """What left either site in a run: kinds, directions, messages, bytes, and the proof that there was no more.

    Every process counts at its gate what it lets out. The tensors' counts are compared with the receivers' and with what
    the schedule table and the step headers say by arithmetic. Ends with exit code 1 where they differ, unless
    the run stopped in the middle of a step and nobody counted more than was planned.

    A run over two machines leaves each site's ledgers on its own: copy the cloud's into the edge's RUN_DIR/ledger.
    """
    from ldt_schedules.runtime.audit import audit as audited

    starts = audited(run_dir)
    if json_output:
        json.dump({"proven": all(one.proven for one in starts), "starts": list(map(_content, starts))}, sys.stdout)
        sys.stdout.write("\n")
    else:
        _show(starts)
    if not all(one.proven for one in starts):
        raise typer.Exit(FAILURE)


def _content(start: StartAudit) -> dict[str, Any]:
    from ldt_schedules.comm.crossing_plan import Direction

    return {
        **asdict(start),
        "proven": start.proven,
        "verdict": start.verdict,
        "bytes_up": start.total(Direction.UP),
        "bytes_down": start.total(Direction.DOWN),
    }


def _show(starts: list[StartAudit]) -> None:
    from rich.console import Console

    console = Console()
    for number, start in enumerate(starts):
        console.print(f"\nstart {number + 1} of {len(starts)}: {start.steps} steps (run {start.run})", highlight=False)
        console.print(_table(start))
        for kind in dict.fromkeys(row.kind for row in start.rows):
            console.print(f"  {kind}: {_says(kind)}", highlight=False, markup=False, soft_wrap=True)
        console.print(_verdict(start), highlight=False, soft_wrap=True)


def _table(start: StartAudit) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("what", "way"):
        table.add_column(name, no_wrap=True)
    for name in ("messages", "bytes", "received", "planned"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in start.rows:
        others = [
            "" if count is None else f"{count.num_bytes:,}" if count == row.sent else f"[red]{count.num_bytes:,}[/]"
            for count in (row.received, row.planned)
        ]
        table.add_row(row.kind, row.direction, f"{row.sent.messages:,}", f"{row.sent.num_bytes:,}", *others)
    return table


_OF_TENSORS = {
    "activation": "outputs of layers, [s, b, h]",
    "gradient": "their gradients",
    "scalars": "gradient norm, whether all is finite, who is ready",
}


def _says(kind: str) -> str:
    """What the other site learns."""
    from ldt_schedules.comm.declared import MESSAGES

    return MESSAGES[kind].says if kind in MESSAGES else _OF_TENSORS.get(kind, "")


def _verdict(start: StartAudit) -> str:
    from ldt_schedules.runtime.audit import Verdict

    if start.missing:
        return f"Not proven: no ledger of this start from {', '.join(start.missing)}."
    if start.verdict is Verdict.EQUAL:
        return "Senders, receivers and plan agree to the byte. Nothing else passed the gates."
    lines = "\n".join(_difference(row) for row in start.rows if not row.agrees)
    if start.verdict is Verdict.WITHIN:
        return (
            "No more passed the gates than the plan says, and in the last step less: the run stopped in the middle of it.\n"
            f"{lines}\n  (a process that was killed wrote its ledger up to 10 s before)"
        )
    what = "More passed the gates than the plan says" if start.verdict is Verdict.MORE else "The accounts differ"
    return f"{what}:\n{lines}"


def _difference(row: Row) -> str:
    assert row.received is not None and row.planned is not None
    return (
        f"  {row.kind} {row.direction}: sent {row.sent.messages:,} messages of {row.sent.num_bytes:,} bytes, received "
        f"{row.received.messages:,} of {row.received.num_bytes:,}, planned {row.planned.messages:,} of "
        f"{row.planned.num_bytes:,}"
    )
