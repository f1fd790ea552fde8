"""The `ldt` command. Verbs load what they need when they run, so that planning starts in a moment and without torch."""

from __future__ import annotations

import typer

from ldt_schedules import __version__
from ldt_schedules.cli import audit, convert, doctor, draw, launch, plan, train, validate, verify
from ldt_schedules.cli.errors import messages_for_people

app = typer.Typer(
    name="ldt",
    help="Train a large model while its data stays in its own building.\n\n"
    "The edge site keeps data, labels, the first and last layers and the loss; a cloud site holds the middle layers.\n\n"
    "Try: ldt draw --ranks 3 --microbatches 6",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in (train, launch, verify, doctor, audit, convert, plan, draw, validate):
    verb.register(app)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True)) -> None:
    if version:
        typer.echo(f"ldt-schedules {__version__}")
        raise typer.Exit


def main() -> None:
    """The entry point: `ldt` and `python -m ldt_schedules`."""
    with messages_for_people():
        app()
