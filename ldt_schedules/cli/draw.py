"""`ldt draw`: schedules and measured steps as pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ldt_schedules.cli import options
from ldt_schedules.cli.files import reading
from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.errors import ScheduleError

if TYPE_CHECKING:
    from ldt_schedules.planning import ScheduleTable
    from ldt_schedules.planning.formats.trace_json import Trace
    from ldt_schedules.planning.problem import Problem
    from ldt_schedules.rendering.panel import Panel

FORMATS = {".png": "picture", ".svg": "picture to zoom into", ".txt": "text", ".json": "for ui.perfetto.dev"}


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("draw")(draw)


def draw(
    table: Annotated[
        Path | None, typer.Argument(help="File of a table or of a trace (ldt-trace/1); or --ranks and --microbatches.")
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Draw into FILE.png, .svg, .txt or .json (for ui.perfetto.dev)."),
    ] = None,
    beside: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--beside", help="Draw this table or trace too, below, on the same scale; may be repeated."),
    ] = None,
    ranks: options.Ranks = None,
    microbatches: options.Microbatches = None,
    schedule: Annotated[str, typer.Option(help="Planner: ldt_1f1b, gpipe, one_f_one_b, auto or auto_zb.")] = "ldt_1f1b",
    problem: options.ProblemFile = None,
    unit: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the times in the problem; s puts a plan on one scale with measured traces."),
    ] = None,
    latency: options.Latency = 0.0,
    bandwidth: options.Bandwidth = None,
    backward: options.Backward = 2.0,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="Draw the evaluation.")] = False,
    width: Annotated[Optional[int], typer.Option(help="Characters a line; default: the terminal's.")] = None,  # noqa: UP045
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the times of all actions as one JSON object.")
    ] = False,
) -> None:
    """Draw when each rank computes what: planned, or measured.

    Example: ldt draw --ranks 3 --microbatches 6 --latency 1

    Example: ldt draw table.json --latency 2 --out plan.png

    Example: ldt draw plan.json --problem problem.json --unit s --beside measured.json --out both.svg

    Example: ldt draw measured.json --out trace.json (open it at ui.perfetto.dev)
    """
    _check_request(out, json_output, beside or [])
    source = _Source(problem, unit, latency, bandwidth, backward)
    if table is not None and ranks is None and microbatches is None:
        panels = [source.file(table)]
    else:
        panels = [source.planned(table, ranks, microbatches, schedule, forward_only)]
    panels += [source.file(path) for path in beside or []]
    _show(panels, out, json_output, width)


def _check_request(out: Path | None, json_output: bool, beside: Sequence[Path]) -> None:
    """Everything that can be refused before anything is read or planned."""
    if json_output and beside:
        raise ConfigError("--json prints one step; draw the others (--beside) into a file of their own")
    if out is None:
        return
    if out.suffix.lower() not in FORMATS:
        allowed = ", ".join(f"{suffix} ({meaning})" for suffix, meaning in FORMATS.items())
        raise ConfigError(f"--out {out} ends in {out.suffix or 'nothing'!r}; it can end in {allowed}")
    if not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no directory {out.parent}")
    if out.is_dir():
        raise ConfigError(f"{out} cannot be written: it is a directory")
    if out.suffix.lower() in (".png", ".svg"):
        from ldt_schedules.rendering.picture import check_available

        check_available()


class _Source:
    """Turns files and planners into panels, all at the same costs: those of --problem, or of the options."""

    def __init__(
        self, problem: Path | None, unit: str | None, latency: float, bandwidth: float | None, backward: float
    ) -> None:
        from ldt_schedules.planning import Costs
        from ldt_schedules.planning.formats import problem_json

        self.path = problem
        self.problem: Problem | None = None
        self.costs = Costs(backward=backward, latency=latency, bandwidth=bandwidth)
        self.unit = "forwards"
        if problem is not None:
            if self.costs != Costs():
                raise ConfigError("--problem has the costs already; leave out --latency, --bandwidth and --backward")
            self.problem = reading(problem, problem_json.loads, "a problem as JSON (ldt-problem/1)")
            self.costs, self.unit = self.problem.costs, unit or "units of time"
        elif unit is not None:
            raise ConfigError("--unit names the unit of the times in a problem; give --problem too")

    def planned(
        self, table: Path | None, ranks: int | None, microbatches: int | None, schedule: str, forward_only: bool
    ) -> Panel:
        """From a planner, for these costs."""
        from ldt_schedules.cli.table_input import read_or_plan
        from ldt_schedules.planning import Layout
        from ldt_schedules.planning.planners import plan_problem
        from ldt_schedules.planning.problem import Problem

        if table is None and self.problem is not None:
            if ranks is not None or microbatches is not None:
                raise ConfigError("--problem has the ranks and microbatches; leave out --ranks and --microbatches")
            made = plan_problem(schedule, self.problem, forward_only)
        elif table is None and ranks is not None and microbatches is not None:
            made = plan_problem(schedule, Problem(Layout.u(ranks), microbatches, self.costs), forward_only)
        else:  # too much or too little: it has the words for that
            made = read_or_plan(table, ranks, microbatches, schedule, forward_only)
        return self._panel(f"{schedule}, {made.layout.num_ranks} ranks, {made.num_microbatches} microbatches", made)

    def file(self, path: Path) -> Panel:
        """From a file: a table is simulated, a trace is as it was measured."""
        from ldt_schedules.planning import ScheduleTable, read_table
        from ldt_schedules.planning.formats import trace_json
        from ldt_schedules.rendering.panel import Panel

        def read(text: str) -> Trace | ScheduleTable:
            return trace_json.loads(text) if trace_json.is_trace(text) else read_table(text)

        content = reading(path, read, "a table or a trace")
        if not isinstance(content, ScheduleTable):
            return Panel(path.name, content)
        try:
            return self._panel(path.name, content)
        except ScheduleError as error:
            raise ScheduleError(f"{path}: {error}") from None

    def _panel(self, title: str, table: ScheduleTable) -> Panel:
        from ldt_schedules.planning import check, simulate
        from ldt_schedules.planning.formats.trace_json import Trace
        from ldt_schedules.rendering.panel import Panel

        check(table)
        if self.problem is not None and not self.problem.layout.same_work(table.layout):
            raise ScheduleError(
                f"its stages stand on other ranks than those of the problem {self.path}, or others are frozen"
            )
        self.costs.check_fit(table.layout, table.num_microbatches)
        timeline = simulate(table.layout, table.ranks, self.costs)
        trace = Trace(table.layout, table.num_microbatches, timeline, self.unit)
        return Panel(title, trace, None if table.forward_only else self._bound(table))

    def _bound(self, table: ScheduleTable) -> float:
        """For tables of this kind, fused or split, without limits of memory: the table may not keep to them."""
        from ldt_schedules.planning.bounds import lower_bounds
        from ldt_schedules.planning.problem import Problem
        from ldt_schedules.planning.table import is_split

        problem = Problem(table.layout, table.num_microbatches, self.costs)
        return lower_bounds(problem, is_split(table.ranks)).best


def _show(panels: Sequence[Panel], out: Path | None, json_output: bool, width: int | None) -> None:
    """Into the file, onto the terminal, or the times as JSON."""
    if out is not None:
        _write(out, panels, width)
    if json_output:
        timeline = panels[0].trace.timeline
        spans = [{**span._asdict(), "action": str(span.action)} for span in timeline.spans]
        typer.echo(json.dumps({"makespan": timeline.makespan, "bubble": timeline.bubble, "spans": spans}))
    elif out is None:
        typer.echo(_text(panels, width or shutil.get_terminal_size((100, 24)).columns), nl=False)
    else:
        for panel in panels:
            typer.echo(panel.heading)
        typer.echo(f"drawn in {out}")


def _text(panels: Sequence[Panel], width: int) -> str:
    from ldt_schedules.rendering.text import timeline_lines

    blocks = []
    for panel in panels:
        lines = timeline_lines(panel.trace.layout, panel.trace.timeline, width)
        blocks.append("\n".join([panel.title, "", *lines] if len(panels) > 1 else lines) + "\n")
    return "\n".join(blocks)


def _write(out: Path, panels: Sequence[Panel], width: int | None) -> None:
    suffix = out.suffix.lower()
    if suffix == ".txt":
        content = _text(panels, width or 100).encode()
    elif suffix == ".json":
        from ldt_schedules.rendering.perfetto import perfetto_json

        content = perfetto_json(panels).encode()
    else:
        from ldt_schedules.rendering.picture import picture_bytes

        content = picture_bytes(panels, suffix[1:])
    try:
        out.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from None
