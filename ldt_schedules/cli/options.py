"""Options that several verbs take, with one text each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Ranks = Annotated[Optional[int], typer.Option(help="Pipeline ranks P, the edge counted.")]  # noqa: UP045
Microbatches = Annotated[Optional[int], typer.Option(help="Microbatches of a step.")]  # noqa: UP045
Latency = Annotated[float, typer.Option(help="Between the sites, one way, in forwards of an edge stage.")]
Bandwidth = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="Between the sites, in messages per forward; default: no limit."),
]
Backward = Annotated[float, typer.Option(help="Length of a backward, in forwards of its stage.")]
ProblemFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--problem", help="File of a problem (ldt-problem/1): what stages and links cost."),
]
