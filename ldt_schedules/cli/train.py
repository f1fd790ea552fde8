"""`ldt train`: a training run, on this machine alone or as one of the two sites."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ldt_schedules.cli.errors import messages_for_people
from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.planners import PLAN_FOR_COSTS
from ldt_schedules.topology import Site

if TYPE_CHECKING:
    from ldt_schedules.training.config import TrainConfig


_Config = Annotated[Path, typer.Argument(help="YAML file of the run; both sites use the same.")]
_Overrides = Annotated[Optional[list[str]], typer.Argument(help="section.key=value, e.g. train.iterations=5")]  # noqa: UP045
_Site = Annotated[Optional[Site], typer.Option(help="Be one site, under torchrun; without it both run here.")]  # noqa: UP045
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with the figures.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Show who would run what, and start nothing.")]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("train")(train)


def train(
    config: _Config,
    overrides: _Overrides = None,
    site: _Site = None,
    json_output: _Json = False,
    dry_run: _DryRun = False,
) -> None:
    """Train a GPT, or a vision-language model, whose data and ends stay on the edge and whose middle runs in the cloud."""
    from ldt_schedules.training.config import load_config

    loaded = load_config(config, overrides or [])
    _check_clipping(loaded)
    if dry_run:
        _show(loaded, json_output)
    elif site is not None:
        _run_site(config, loaded, site, json_output)
    else:
        _launch(config, loaded, overrides or [], json_output)


def _launch(path: Path, config: TrainConfig, overrides: list[str], json_output: bool) -> None:
    """Start all processes of both sites on this machine."""
    from ldt_schedules.training.checkpointing import check_start
    from ldt_schedules.training.launcher import ChildFailed, Stopped
    from ldt_schedules.training.local_run import run_locally

    if "RANK" in os.environ:
        raise ConfigError(
            "this process was started by torchrun (RANK is set), but it is not said for which site; "
            "start each site with its own torchrun and --site edge or --site cloud, or run without torchrun"
        )
    _check_data(config)
    _check_table(config)
    check_start(config)
    try:
        run_locally(str(path), config, overrides, json_output=json_output)
    except (ChildFailed, Stopped) as error:
        typer.echo(f"ldt: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def _check_data(config: TrainConfig) -> None:
    """Find the usual mistakes about the data, and where the result goes, before processes start."""
    from ldt_schedules.training.huggingface_model import check_save

    if config.has_vision:
        from ldt_schedules.training.run_data import prepare_images

        prepare_images(config)
    else:
        from ldt_schedules.training.data import check_data

        check_data(config)
    check_save(config, Site.EDGE)


def _check_clipping(config: TrainConfig) -> None:
    if config.model.precision == "fp64" and config.train.clip_grad:
        raise ConfigError(
            f"train.clip_grad is {config.train.clip_grad:g}, but megatron-core clips no float64 gradients "
            "(model.precision fp64); set train.clip_grad=0"
        )


def _check_table(config: TrainConfig) -> None:
    """Read a table file, and try a planner that may refuse (costs, memory, split backwards), before processes start.

    The other planners need no check, and no torch here.
    """
    may_refuse = config.schedule.table is not None or config.schedule.planner in PLAN_FOR_COSTS
    if may_refuse and config.num_pipeline_ranks > 1:
        from ldt_schedules.training.schedule import table_source

        table_source(config)


def _run_site(path: Path, config: TrainConfig, site: Site, json_output: bool) -> None:
    """Be one process of one site."""
    from ldt_schedules.training.launcher import exit_with_launcher

    exit_with_launcher()
    _check_site(path, config, site)
    # "Apex is not installed" and a dozen more, at each import of megatron-core in each process.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    # For people: without the line of code that found it.
    warnings.formatwarning = lambda message, *_, **__: f"ldt: {message}\n"
    from ldt_schedules.comm.stopping import leave_now
    from ldt_schedules.megatron import session
    from ldt_schedules.training.loop import run_site

    try:
        with messages_for_people():
            run_site(config, str(site), json_output)
    except SystemExit as stop:
        if session.current() is not None:  # what the interpreter does at its end may wait for those who have gone
            leave_now(int(stop.code or 0))
        raise


def _check_site(path: Path, config: TrainConfig, site: Site) -> None:
    """Raises ConfigError unless the environment holds as many processes as the site has.

    A site of one process needs no torchrun: what torchrun would set is set here.
    """
    needed = config.site_processes(site)
    if needed == 0:
        raise ConfigError("sites.cloud.pipeline_ranks is 0, so there is no cloud; set it to 1 or more")
    if config.num_pipeline_ranks > 1 and config.link.port == 0:
        raise ConfigError(
            f"link.address is {config.link.address}: with --site the sites meet at a port that both know; "
            "give both the same link.address=HOST:PORT, HOST being a name or address of the cloud's first machine"
        )
    started = _number_in_environment("WORLD_SIZE")
    if started is None and needed == 1:
        from ldt_schedules.comm.ports import free_ports

        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_ports(1)[0]))
        return
    if started != needed:
        raise ConfigError(
            f"the {site} has {needed} processes (sites.{site} in {path}), but "
            f"{'1 was' if started is None else f'{started} were'} started; "
            f"use: torchrun --nproc-per-node {needed} -m ldt_schedules train {path} --site {site}"
        )


def _number_in_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise ConfigError(f"environment variable {name} is {text!r}; torchrun sets it to a number")
    return int(text)


def _show(config: TrainConfig, json_output: bool) -> None:
    """What would run: the first screen and the schedule."""
    from rich.console import Console

    from ldt_schedules.training.describe import describe_run
    from ldt_schedules.training.run_data import vocab_size_of
    from ldt_schedules.training.screens import first_screen

    run = describe_run(config, vocab_size_of(config))
    if json_output:
        json.dump({**asdict(run), "parameters": run.parameters}, sys.stdout)
        sys.stdout.write("\n")
        return
    console = Console()
    console.print(first_screen(run))
    for line in _timeline(config, console.width):
        typer.echo(line)


def _timeline(config: TrainConfig, width: int) -> list[str]:
    """The training step, every forward taken as one unit of time and every backward as two."""
    if config.num_pipeline_ranks == 1:
        return []
    from ldt_schedules.planning import simulate
    from ldt_schedules.rendering.text import timeline_lines
    from ldt_schedules.training.schedule import table_source

    table = table_source(config)(config.num_microbatches, False)
    return timeline_lines(table.layout, simulate(table.layout, table.ranks), width)
