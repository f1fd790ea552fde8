"""`ldt draw`: a schedule as a picture."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("draw")(draw)


def draw(
    table: Annotated[Path | None, typer.Argument(help="File of a table; or give --ranks and --microbatches.")] = None,
    ranks: Annotated[Optional[int], typer.Option(help="Pipeline ranks P, the edge counted.")] = None,  # noqa: UP045
    microbatches: Annotated[Optional[int], typer.Option(help="Microbatches of a step.")] = None,  # noqa: UP045
    schedule: Annotated[str, typer.Option(help="Planner: ldt_1f1b or gpipe.")] = "ldt_1f1b",
    latency: Annotated[float, typer.Option(help="Between the sites, one way, in forwards of a stage.")] = 0.0,
    backward: Annotated[float, typer.Option(help="Length of a backward, in forwards of a stage.")] = 2.0,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="Draw the evaluation.")] = False,
    width: Annotated[Optional[int], typer.Option(help="Characters a line; default: the terminal's.")] = None,  # noqa: UP045
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the times of all actions as one JSON object.")
    ] = False,
) -> None:
    """Draw when each rank computes what.

    Example: ldt draw --ranks 3 --microbatches 6 --latency 1
    """
    from ldt_schedules.cli.table_input import read_or_plan
    from ldt_schedules.planning import Costs, check, simulate
    from ldt_schedules.rendering.text import timeline_lines

    chosen = read_or_plan(table, ranks, microbatches, schedule, forward_only)
    check(chosen)
    timeline = simulate(chosen.layout, chosen.ranks, Costs(backward=backward, latency=latency))
    if json_output:
        spans = [{**asdict(span), "action": str(span.action)} for span in timeline.spans]
        typer.echo(json.dumps({"makespan": timeline.makespan, "bubble": timeline.bubble, "spans": spans}))
        return
    for line in timeline_lines(chosen.layout, timeline, width or shutil.get_terminal_size((100, 24)).columns):
        typer.echo(line)
