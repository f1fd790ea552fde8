"""`ldt plan`: make a schedule table and say what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from ldt_schedules.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("plan")(plan)


def plan(
    ranks: Annotated[int, typer.Option(help="Pipeline ranks P, the edge counted.")],
    microbatches: Annotated[int, typer.Option(help="Microbatches of a step.")],
    schedule: Annotated[str, typer.Option(help="Planner: ldt_1f1b or gpipe.")] = "ldt_1f1b",
    latency: Annotated[float, typer.Option(help="Between the sites, one way, in forwards of a stage.")] = 0.0,
    backward: Annotated[float, typer.Option(help="Length of a backward, in forwards of a stage.")] = 2.0,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="A table for evaluation.")] = False,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Write the table here.")] = None,  # noqa: UP045
    format_name: Annotated[str, typer.Option("--format", help="Of the file: json or grid.")] = "json",
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Plan a step of a U and say how long it takes and how much each rank holds.

    Example: ldt plan --ranks 4 --microbatches 8 --latency 2 -o table.json
    """
    from ldt_schedules.planning import Costs, Layout, simulate, table_hash, write_table
    from ldt_schedules.planning import plan as make

    table = make(schedule, Layout.u(ranks), microbatches, forward_only=forward_only)
    timeline = simulate(table.layout, table.ranks, Costs(backward=backward, latency=latency))
    text = write_table(table, format_name)
    if output is not None:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{output} cannot be written: {error.strerror}") from None
    figures = {
        "schedule": schedule,
        "ranks": ranks,
        "microbatches": microbatches,
        "makespan": timeline.makespan,
        "bubble": timeline.bubble,
        "bubble_of_rank": [timeline.bubble_of(rank) for rank in range(ranks)],
        "peak_in_flight": list(timeline.peak_in_flight),
        "hash": table_hash(table),
        "file": None if output is None else str(output),
    }
    if json_output:
        typer.echo(json.dumps(figures))
        return
    typer.echo(f"{schedule}: {ranks} pipeline ranks, {microbatches} microbatches, latency {latency:g} forwards")
    typer.echo(f"makespan        {timeline.makespan:g} forwards")
    typer.echo(f"bubble          {timeline.bubble:.1%} of the ranks' time")
    typer.echo("in flight       " + ", ".join(f"rank {r}: {n}" for r, n in enumerate(timeline.peak_in_flight)))
    typer.echo(f"table           {output or 'not written (-o FILE)'}")
    if output is None:
        typer.echo(f"see it          ldt draw --ranks {ranks} --microbatches {microbatches} --schedule {schedule}")
