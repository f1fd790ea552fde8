"""`ldt plan`: make a schedule table and say what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ldt_schedules.cli import options
from ldt_schedules.errors import ConfigError

if TYPE_CHECKING:
    from ldt_schedules.cli.problem_input import PlanInput
    from ldt_schedules.planning.evaluation import Evaluation
    from ldt_schedules.planning.problem import Problem
    from ldt_schedules.planning.table import ScheduleTable

_FORMATS = {".json": "json", ".csv": "csv", ".txt": "grid", ".grid": "grid"}

_Config = Annotated[Optional[Path], typer.Argument(help="YAML file of a run: plan its step.")]  # noqa: UP045
_Overrides = Annotated[Optional[list[str]], typer.Argument(help="section.key=value, for a config.")]  # noqa: UP045
_Measure = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--measure", help="With a config: take the times from this run's trace (train.trace_iterations)."),
]
_Schedule = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Planner: ldt_1f1b, ldt_2lap_1f1b (the published orders), gpipe, one_f_one_b, auto, auto_zb (backwards "
        "split), exact (small cases). Without it all that apply are compared and the fastest fused one is taken."
    ),
]
_Memory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Budget: none, 1x (what the published order needs), 1.5x, 2x, dev (every cloud rank as much as the fullest "
        "one has now, the edge 4x), 8GiB, or one amount a rank. Default: dev; of a problem, its own mem_cap."
    ),
]
_Freeze = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="STAGES",
        help="Stages that are not trained, by number or name: 0,1 or head,cloud1. What is frozen from the data on has no "
        "backward, and no gradient is sent to it; a frozen stage behind a trained one passes the gradient on, in half the "
        'time. In a problem: "frozen": true of the stage.',
    ),
]
_SaveProblem = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--save-problem", help="Write what was planned, costs and memory, as a problem (ldt-problem/1)."),
]
_Format = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--format", help="Of the file: json, grid or csv; default: as its name ends."),
]
_Out = Annotated[Optional[Path], typer.Option("--out", "--output", "-o", help="Write the table: .json, .csv, .txt.")]  # noqa: UP045


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("plan")(plan)


def plan(
    config: _Config = None,
    overrides: _Overrides = None,
    problem: options.ProblemFile = None,
    measure: _Measure = None,
    ranks: options.Ranks = None,
    microbatches: options.Microbatches = None,
    domains: Annotated[int, typer.Option(help="Cloud pipelines that the edge serves.")] = 1,
    laps: Annotated[int, typer.Option(help="Times the pipeline goes round: 2 for vision and language.")] = 1,
    latency: options.Latency = 0.0,
    bandwidth: options.Bandwidth = None,
    backward: options.Backward = 2.0,
    cloud: Annotated[
        float, typer.Option(help="Length of a cloud stage's forward, in forwards of an edge stage.")
    ] = 1.0,
    freeze: _Freeze = None,
    schedule: _Schedule = None,
    memory: _Memory = None,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="A table for evaluation.")] = False,
    out: _Out = None,
    save_problem: _SaveProblem = None,
    format_name: _Format = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Plan a step: how long it takes, what each rank holds, how far it is from the proven limit, what would help.

    Example: ldt plan configs/two_sites.yaml

    Example: ldt plan --ranks 4 --microbatches 16 --latency 4 --cloud 2

    Example: ldt plan --ranks 3 --laps 2 --microbatches 8 --freeze 0,1,2

    Example: ldt plan --problem problem.json --schedule auto --memory 2x --out table.json --json
    """
    from ldt_schedules.cli import problem_input
    from ldt_schedules.cli.files import writing
    from ldt_schedules.planning import write_table
    from ldt_schedules.planning.budgets import within_budget
    from ldt_schedules.planning.formats import problem_json

    form = _format(out, format_name)
    _one_source(config, problem, measure, ranks, microbatches, freeze)
    if config is not None:
        given = problem_input.from_config(config, overrides or [], measure)
    elif problem is not None:
        given = problem_input.from_file(problem)
    else:
        given = problem_input.from_numbers(
            ranks, microbatches, domains, laps, latency, bandwidth, backward, cloud, freeze
        )
    budget = memory or given.budget
    limited = within_budget(given.problem, budget)
    candidates = _candidates(schedule, limited, quiet=json_output)
    chosen = _chosen(candidates)
    table = _table(chosen, limited, forward_only)
    for path, text in (
        (out, lambda: write_table(table, form)),
        (save_problem, lambda: problem_json.dumps(limited)),
    ):
        if path is not None:
            writing(path, text())
    if json_output:
        figures = _figures(chosen, limited, table, budget, given, out)
        if schedule is None:
            figures["candidates"] = [_short_figures(candidate) for candidate in candidates]
        typer.echo(json.dumps(figures))
        return
    from ldt_schedules.cli.plan_screen import show

    show(given, limited, budget, candidates, chosen, explain=schedule is None, out=out)


def _one_source(
    config: Path | None, problem: Path | None, measure: Path | None, ranks: int | None, microbatches: int | None,
    freeze: str | None,
) -> None:  # fmt: skip
    """What is to be planned must be said once."""
    numbers = ranks is not None or microbatches is not None
    if config is not None and (problem is not None or numbers):
        raise ConfigError("give a config, or --problem, or --ranks and --microbatches: one of them")
    if config is None and measure is not None:
        raise ConfigError("--measure needs the config of the run too: ldt plan CONFIG --measure RUN_DIR")
    if problem is not None and numbers:
        raise ConfigError("--problem has the ranks and microbatches; leave out --ranks and --microbatches")
    if freeze is not None and config is not None:
        raise ConfigError("--freeze goes with --ranks and --microbatches; which stages of a run train, its config says")
    if freeze is not None and problem is not None:
        raise ConfigError(
            '--freeze goes with --ranks and --microbatches; in a problem, write "frozen": true of the stage'
        )


def _format(out: Path | None, format_name: str | None) -> str:
    """Of the file to be written; refused before anything is planned."""
    from ldt_schedules.planning.formats import FORMATS

    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no directory {out.parent}")
    form = format_name or _FORMATS.get(out.suffix.lower() if out else ".json", "json")
    if form not in FORMATS:
        raise ConfigError(f"there is no format {form!r}; there are {', '.join(FORMATS)}")
    return form


def _candidates(schedule: str | None, problem: Problem, quiet: bool) -> list[Evaluation]:
    """The named planner's plan, or those of all that know the layout."""
    from rich.console import Console

    from ldt_schedules.planning.errors import ScheduleError
    from ldt_schedules.planning.evaluation import plan_and_evaluate
    from ldt_schedules.planning.planners import planner
    from ldt_schedules.planning.planners.published import name_of_published

    if schedule is not None:
        planner(schedule)  # an unknown name is refused before the work
        names = [schedule]
    else:
        names = [name_of_published(problem.layout), "gpipe"]
        names += ["auto"] if problem.can_fuse else []
        names += ["auto_zb"] if problem.can_split else []
    found = []
    console = Console(stderr=True, quiet=quiet or not Console(stderr=True).is_terminal)
    for name in dict.fromkeys(names):
        with console.status(f"planning {name} …"):
            try:
                found.append(plan_and_evaluate(name, problem))
            except ScheduleError:
                if schedule is not None:
                    raise
    return found


def _chosen(candidates: list[Evaluation]) -> Evaluation:
    """The fastest that fits and whose backwards are in one piece (what every runtime executes), else the fastest."""
    from ldt_schedules.planning.table import is_split

    return min(candidates, key=lambda one: (not one.fits, is_split(one.order), one.makespan))


def _table(chosen: Evaluation, problem: Problem, forward_only: bool) -> ScheduleTable:
    from ldt_schedules.planning.planners import table_of

    if not forward_only and not chosen.fits:
        over = [
            f"rank {rank} needs {peak:g} and may hold {problem.cap(rank):g}"
            for rank, peak in enumerate(chosen.peaks)
            if not problem.allows(rank, peak)
        ]
        raise ConfigError(
            f"the {chosen.name} order does not fit into the memory budget: {', '.join(over)}; give more memory "
            "(--memory) or take --schedule auto, which plans for what there is"
        )
    return table_of(chosen.order, problem, forward_only, chosen.timeline)


def _short_figures(candidate: Evaluation) -> dict[str, Any]:
    return {
        "schedule": candidate.name,
        "makespan": candidate.makespan,
        "lower_bound": candidate.bounds.best,
        "bubble": candidate.timeline.bubble,
        "exposed": list(candidate.timeline.exposed),
        "peak_memory": list(candidate.peaks),
        "fits": candidate.fits,
    }


def _figures(
    chosen: Evaluation, problem: Problem, table: ScheduleTable, budget: str, given: PlanInput, out: Path | None
) -> dict[str, Any]:
    from ldt_schedules.planning import simulate, table_hash

    timeline = chosen.timeline
    if table.forward_only:
        timeline = simulate(problem.layout, table.ranks, problem.costs)
    return {
        **_short_figures(chosen),
        "ranks": problem.layout.num_ranks,
        "microbatches": problem.num_microbatches,
        "makespan": timeline.makespan,
        "bubble": timeline.bubble,
        "bound": chosen.bounds.reason,
        "distance": chosen.distance,
        "bubble_of_rank": [timeline.bubble_of(rank) for rank in range(problem.layout.num_ranks)],
        "peak_in_flight": list(timeline.peak_in_flight),
        "memory": budget,
        "memory_cap": list(problem.memory_cap) or None,
        "rate_up": chosen.rate_up,
        "rate_down": chosen.rate_down,
        "time_unit": given.time_unit,
        "memory_unit": given.memory_unit,
        "hash": table_hash(table),
        "file": None if out is None else str(out),
    }
