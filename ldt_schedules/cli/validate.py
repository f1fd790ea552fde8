"""`ldt validate`: everything that is wrong with a table, each with its place."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("validate")(validate)


def validate(
    table: Annotated[Path, typer.Argument(help="File of the table: JSON (ldt-table/1) or a grid.")],
    blocking: Annotated[
        bool, typer.Option("--blocking", help="Demand that it runs even if every SEND and RECV blocks.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a table: every action possible, every value made once and taken once, messages in order, nobody stuck.

    Example: ldt validate table.json
    """
    from ldt_schedules.cli.errors import USER_MISTAKE
    from ldt_schedules.cli.table_input import read
    from ldt_schedules.planning import validate as find_violations

    read_table = read(table)
    violations = find_violations(read_table, blocking=blocking)
    if json_output:
        typer.echo(json.dumps({"valid": not violations, "violations": [asdict(v) for v in violations]}))
    elif violations:
        for violation in violations:
            typer.echo(violation.render(), err=True)
        typer.echo(f"{table}: {len(violations)} violation{'s' if len(violations) > 1 else ''}", err=True)
    else:
        count = sum(len(row) for row in read_table.ranks)
        typer.echo(
            f"{table}: valid; {len(read_table.ranks)} pipeline ranks, {read_table.num_microbatches} microbatches, "
            f"{count} actions"
        )
    if violations:
        raise SystemExit(USER_MISTAKE)
