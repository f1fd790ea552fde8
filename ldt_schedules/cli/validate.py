"""`ldt validate`: everything that is wrong with a table, each with its place."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("validate")(validate)


def validate(
    table: Annotated[Path, typer.Argument(help="File of the table: JSON (ldt-table/1), CSV or a grid.")],
    problem: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--problem", help="What it is for (ldt-problem/1): stages and ranks must agree, memory must do."),
    ] = None,
    blocking: Annotated[
        bool, typer.Option("--blocking", help="Demand that it runs even if every SEND and RECV blocks.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a table: every action possible, every value made once and taken once, messages in order, nobody stuck.

    Example: ldt validate table.json --problem problem.json
    """
    from ldt_schedules.cli.errors import USER_MISTAKE
    from ldt_schedules.cli.files import reading
    from ldt_schedules.cli.table_input import read
    from ldt_schedules.planning import validate as find_violations
    from ldt_schedules.planning.evaluation import evaluate
    from ldt_schedules.planning.formats import problem_json
    from ldt_schedules.planning.progress import Semantics
    from ldt_schedules.planning.validator import deadlocks_when_blocking

    read_table = read(table)
    wanted = None if problem is None else reading(problem, problem_json.loads, "a problem as JSON (ldt-problem/1)")
    semantics = Semantics.BLOCKING if blocking else Semantics.RENDEZVOUS
    violations = find_violations(read_table, semantics, wanted)
    stands_still = not violations and deadlocks_when_blocking(read_table)
    worth = None if violations or wanted is None or read_table.forward_only else evaluate("", wanted, read_table.ranks)
    if json_output:
        content = {"valid": not violations, "violations": [asdict(v) for v in violations]}
        if not violations:
            content["blocking_ok"] = not stands_still
        if worth is not None:
            content |= {
                "makespan": worth.makespan,
                "lower_bound": worth.bounds.best,
                "peak_memory": list(worth.peaks),
                "bubble": worth.timeline.bubble,
            }
        typer.echo(json.dumps(content))
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
        if worth is not None:
            typer.echo(
                f"makespan {worth.makespan:g}, {worth.distance - 1:.2%} over the proven bound {worth.bounds.best:g}"
            )
        if stands_still:
            typer.echo("it would stand still if every SEND and RECV held up its rank; the runtime only posts them")
    if violations:
        raise SystemExit(USER_MISTAKE)
