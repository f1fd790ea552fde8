"""`ldt doctor`: what is installed here, what is between the sites, and why a run stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ldt_schedules.cli.errors import USER_MISTAKE
from ldt_schedules.errors import ConfigError
from ldt_schedules.topology import Site

if TYPE_CHECKING:
    from ldt_schedules.training.link_check import LinkReport

_PICTURES = (".png", ".svg")

_Config = Annotated[Optional[Path], typer.Argument(help="YAML file of a run: measure its link.")]  # noqa: UP045
_Overrides = Annotated[Optional[list[str]], typer.Argument(help="section.key=value, e.g. link.address=HOST:PORT")]  # noqa: UP045
_Site = Annotated[
    Optional[Site],  # noqa: UP045
    typer.Option(help="Be one site: start the other at the same time. Without it both ends are on this machine."),
]
_Seconds = Annotated[float, typer.Option(min=0.1, max=600.0, help="Of transfer in each direction.")]
_Wait = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the other site.")]
_PostMortem = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--post-mortem", metavar="DIR", help="Why did a run stop? DIR holds the files its processes left."),
]
_Out = Annotated[Optional[Path], typer.Option("--out", "-o", help="With --post-mortem: a picture, .png or .svg.")]  # noqa: UP045
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="With --post-mortem: each process's stack, too.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with the figures.")]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("doctor")(doctor)


def doctor(
    config: _Config = None,
    overrides: _Overrides = None,
    site: _Site = None,
    seconds: _Seconds = 5.0,
    wait: _Wait = 60.0,
    post_mortem: _PostMortem = None,
    out: _Out = None,
    verbose: _Verbose = False,
    json_output: _Json = False,
) -> None:
    """Look for what is wrong: before a run at the installation and the link, after one that failed at what it left.

    ldt doctor: versions, devices and backends of this machine; would a run
    start on it?

    ldt doctor CONFIG --site edge, and --site cloud at the other site at the
    same time: do they reach each other, with the same config and versions?
    Latency, bandwidth, clocks; what a step sends, and how long that takes. The
    cloud listens at link.address. Nothing is trained.

    ldt doctor --post-mortem DIR: the cause, how far each rank was, what each
    process waited for, and who left no file.

    Exit codes: 0 all is well, 2 there is something to mend, 1 the sites did
    not meet.

    Example: ldt doctor configs/quickstart.yaml

    Example: ldt doctor configs/two_sites.yaml link.address=10.0.0.7:29500 --site cloud
    """
    _one_task(config, site, post_mortem, out, verbose)
    if post_mortem is not None:
        _show_post_mortem(post_mortem, out, verbose, json_output)
    elif config is not None:
        _show_link(config, overrides or [], site, seconds, wait, json_output)
    else:
        _show_installation(json_output)


def _one_task(
    config: Path | None, site: Site | None, post_mortem: Path | None, out: Path | None, verbose: bool
) -> None:
    if post_mortem is not None and (config is not None or site is not None):
        raise ConfigError("--post-mortem reads the files of a run that is over; leave out the config and --site")
    if post_mortem is None and (out is not None or verbose):
        raise ConfigError(f"{'--out' if out else '--verbose'} goes with --post-mortem DIR; leave it out")
    if site is not None and config is None:
        raise ConfigError(f"--site {site} needs the config of the run: ldt doctor CONFIG --site {site}")
    if out is not None and out.suffix.lower() not in _PICTURES:
        raise ConfigError(f"--out {out}: the name must end in {' or '.join(_PICTURES)}")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out} cannot be written: there is no directory {out.parent}")


def _show_installation(json_output: bool) -> None:
    from ldt_schedules.training.installation import inspect_installation

    found = inspect_installation()
    if json_output:
        _print_json(found.figures())
    else:
        from ldt_schedules.cli.doctor_screen import show_installation

        show_installation(found)
    if found.problems:
        raise typer.Exit(USER_MISTAKE)


def _show_link(
    path: Path, overrides: list[str], site: Site | None, seconds: float, wait: float, json_output: bool
) -> None:
    from ldt_schedules.training.config import load_config

    config = load_config(path, overrides)
    from ldt_schedules.training.link_check import CheckOptions, check_here, check_link

    with _telling(site) as tell:
        options = CheckOptions(wait, seconds, tell)
        report = check_here(config, options) if site is None else check_link(config, site, options)
    _print_report(report, json_output)
    if report.differing_config:
        raise typer.Exit(USER_MISTAKE)


def _print_report(report: LinkReport, json_output: bool) -> None:
    if json_output:
        _print_json(report.figures())
        return
    from ldt_schedules.cli.doctor_screen import show_link

    show_link(report)


@contextmanager
def _telling(site: Site | None) -> Iterator[Callable[[str], None]]:
    """Says what is awaited: in one line that changes, or where the output is no terminal in a line for each change."""
    from rich.console import Console
    from rich.markup import escape

    console, name = Console(stderr=True, highlight=False), f"{site}: " if site else ""
    if console.is_terminal:
        with console.status(f"{name}starting …") as status:
            yield lambda text: status.update(escape(f"{name}{text} …"))
        return
    said: set[str] = set()

    def tell(text: str) -> None:
        if text not in said:
            said.add(text)
            console.print(f"{name}{text} …", markup=False, soft_wrap=True)

    yield tell


def _show_post_mortem(directory: Path, out: Path | None, verbose: bool, json_output: bool) -> None:
    from ldt_schedules.cli.post_mortem_screen import figures, picture, show
    from ldt_schedules.runtime.post_mortem import read_post_mortem

    found = read_post_mortem(directory)
    if out is not None:
        content = picture(found, out.suffix.lower().removeprefix("."))
        try:
            out.write_bytes(content)
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    if json_output:
        _print_json({**figures(found), "file": None if out is None else str(out)})
    else:
        show(found, directory, verbose, out)


def _print_json(content: dict[str, Any]) -> None:
    json.dump(content, sys.stdout)
    sys.stdout.write("\n")
