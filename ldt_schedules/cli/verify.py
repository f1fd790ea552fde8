"""`ldt verify`: are the numbers of a split run those of the same model in one process?"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ldt_schedules.cli.errors import FAILURE
from ldt_schedules.errors import ConfigError
from ldt_schedules.topology import Site

if TYPE_CHECKING:
    from ldt_schedules.training.config import TrainConfig
    from ldt_schedules.training.verification.gate import Gate, PlantedResult

_Config = Annotated[Path, typer.Argument(help="YAML file of the run that is to be verified.")]
_Overrides = Annotated[Optional[list[str]], typer.Argument(help="section.key=value, e.g. model.precision=fp64")]  # noqa: UP045
_Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps that are compared.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with the figures.")]
_SelfTest = Annotated[
    bool,
    typer.Option("--self-test", help="Plant known errors, a run for each, and see that they are caught and named."),
]
_Keep = Annotated[Optional[Path], typer.Option(help="Keep records and logs of all runs in this new directory.")]  # noqa: UP045
_Tolerance = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="Another tolerance: loss, gradients, grad_norm, weights, small_gradient; e.g. gradients=1e-4."),
]
# What the processes of a run are told by the command that starts them.
_Site = Annotated[Optional[Site], typer.Option(hidden=True)]  # noqa: UP045
_Record = Annotated[Optional[Path], typer.Option(hidden=True)]  # noqa: UP045
_OneProcess = Annotated[bool, typer.Option("--one-process", hidden=True)]
_Plant = Annotated[Optional[str], typer.Option(hidden=True)]  # noqa: UP045


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("verify")(verify)


def verify(
    config: _Config,
    overrides: _Overrides = None,
    steps: _Steps = 3,
    json_output: _Json = False,
    self_test: _SelfTest = False,
    keep: _Keep = None,
    tolerance: _Tolerance = None,
    site: _Site = None,
    record: _Record = None,
    one_process: _OneProcess = False,
    plant: _Plant = None,
) -> None:
    """Hold a run, split over both sites on this machine, against the same model in one process, step by step.

    Compared are losses, every parameter's gradient, the gradient norm and updated weights. Exit code 0: within the
    tolerances, 1: not.

    Example: ldt verify configs/quickstart.yaml --self-test
    """
    from ldt_schedules.training.config import load_config
    from ldt_schedules.training.verification.configs import split_config

    # Both sites are on this machine, wherever the config's are; a process is given the port besides.
    local = [] if site else ["link.address=127.0.0.1:0"]
    given = [*(overrides or []), *local]
    loaded = split_config(load_config(config, given))
    if site is not None:
        assert record is not None, "--site is for the processes that this command starts"
        _be_one_process(loaded, site, record, steps, one_process, plant)
        return
    _check_start(loaded, plant)
    with _directory(keep) as directory:
        command = ["verify", str(config), *given, "--steps", str(steps)]
        gate = _gate(command, loaded, steps, tolerance or [], directory, keep is not None)
        with _failures_for_people(keep):
            passed, figures = _self_test(gate, json_output) if self_test else _compare(gate, plant, json_output)
    if json_output:
        json.dump(figures, sys.stdout)
        sys.stdout.write("\n")
    if not passed:
        raise typer.Exit(FAILURE)


def _be_one_process(
    config: TrainConfig, site: Site, directory: Path, steps: int, one_process: bool, plant: str | None
) -> None:
    from ldt_schedules.training.launcher import exit_with_launcher

    exit_with_launcher()
    # "Apex is not installed" and a dozen more, at each import of megatron-core in each process.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    from ldt_schedules.training.verification.configs import whole_config
    from ldt_schedules.training.verification.recorder import record

    vocab_slices = config.topology.size(Site.EDGE).tensor
    record(whole_config(config) if one_process else config, site, directory, steps, vocab_slices, plant)


def _check_start(config: TrainConfig, plant: str | None) -> None:
    """Find users' mistakes once, before several processes do."""
    from ldt_schedules.training.data import check_data
    from ldt_schedules.training.verification.planted import PLANTED

    if "RANK" in os.environ:
        raise ConfigError(
            "this process was started by torchrun (RANK is set), but ldt verify starts the processes of both sites "
            "itself, on this machine; run it without torchrun"
        )
    check_data(config)
    if config.schedule.table is not None:
        from ldt_schedules.training.schedule import table_source

        table_source(config)
    if plant is not None:
        if plant not in PLANTED:
            raise ConfigError(f"--plant {plant}: give one of {', '.join(PLANTED)}")
        reason = PLANTED[plant].not_for(config)
        if reason is not None:
            raise ConfigError(f"--plant {plant} cannot be made with this config: {reason}")


def _gate(
    command: list[str], config: TrainConfig, steps: int, tolerances: list[str], directory: Path, keep: bool
) -> Gate:
    from rich.console import Console

    from ldt_schedules.training.verification.gate import Gate
    from ldt_schedules.training.verification.tolerances import TOLERANCES, with_overrides

    allowed = with_overrides(TOLERANCES[config.model.precision], tolerances)
    return Gate(command, config, steps, allowed, directory, Console(stderr=True), keep)


def _compare(gate: Gate, plant: str | None, json_output: bool) -> tuple[bool, dict[str, Any]]:
    """One comparison: did it pass, and its figures."""
    from rich.console import Console

    from ldt_schedules.training.verification.screens import report_screen

    report = gate.compare(plant)
    Console(stderr=json_output).print(report_screen(report))
    return report.passed, report.figures()


def _self_test(gate: Gate, json_output: bool) -> tuple[bool, dict[str, Any]]:
    """The clean run, then every planted error: did all go as it should, and the figures."""
    from rich.console import Console

    from ldt_schedules.training.verification.screens import report_screen, self_test_screen

    console = Console(stderr=json_output)
    clean = gate.compare()
    console.print(report_screen(clean))
    results = list(gate.try_planted())
    console.print(self_test_screen(clean, results))
    passed = clean.passed and all(result.passed for result in results)
    planted = [_planted_figures(result) for result in results]
    return passed, {"passed": passed, "clean": clean.figures(), "planted": planted}


def _planted_figures(result: PlantedResult) -> dict[str, Any]:
    figures: dict[str, Any] = {"name": result.planted.name, "what": result.planted.what, "not_for": result.not_for}
    if result.not_for is None:
        figures |= {"caught": result.caught, "named": result.named, "says": result.says}
    return figures


@contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    """Where the runs record: a temporary directory, or the one to keep."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="ldt-verify-") as temporary:
            yield Path(temporary)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        used = any(keep.iterdir())
    except OSError as error:
        raise ConfigError(f"--keep {keep} cannot be made: {error.strerror}") from None
    if used:
        raise ConfigError(f"--keep {keep} is not empty; give a new directory, so that no other run's records are read")
    yield keep


@contextmanager
def _failures_for_people(keep: Path | None) -> Iterator[None]:
    from ldt_schedules.training.launcher import ChildFailed, Stopped

    try:
        yield
    except (ChildFailed, Stopped) as error:
        failed = isinstance(error, ChildFailed) and error.exit_code == FAILURE
        hint = "\n(--keep DIR keeps the logs of all processes)" if failed and keep is None else ""
        typer.echo(f"ldt: {error}{hint}", err=True)
        raise typer.Exit(error.exit_code) from None
