"""`ldt convert`: checkpoints of sites, of stock Megatron and of Hugging Face, one into the other."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ldt_schedules.errors import ConfigError
from ldt_schedules.topology import Site

if TYPE_CHECKING:
    from ldt_schedules.megatron.converting.assembling import Converted, Progress
    from ldt_schedules.megatron.converting.splitting import HolderOf
    from ldt_schedules.megatron.huggingface.saving import Holder

app = typer.Typer(
    name="convert",
    help="Turn checkpoints of edge and cloud into one of stock Megatron, and back; and both into Hugging Face's and back.\n\n"
    "Everything is read and written tensor by tensor, in one process without a GPU. Nothing that is pickled in a checkpoint "
    "is executed, or taken over unread. The result appears under its name when it is complete.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Out = Annotated[Path, typer.Argument(metavar="OUT", help="New or empty directory for the result.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with the figures.")]
_WeightsOnly = Annotated[
    bool, typer.Option("--weights-only", help="Leave out the optimizer and the states of modules.")
]
_Edge = Annotated[Path, typer.Argument(metavar="EDGE", help="The edge's checkpoint: a step, or a directory of steps.")]
_Cloud = Annotated[Path, typer.Argument(metavar="CLOUD", help="The cloud's, of the same step.")]
_Source = Annotated[
    Path, typer.Argument(metavar="IN", help="A plain Megatron checkpoint, or a Hugging Face directory.")
]
_Site = Annotated[Site, typer.Option("--site", help="Whose part to write.")]
_Layers = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Layers of head, cloud ranks and tail: 1,3,3,1 or Et|t*3|t*3|tL; of a vision-language model "
        '"{vit: [1, 1, 1, 0], llm: [0, 2, 2, 0]}".'
    ),
]
_Config = Annotated[Optional[Path], typer.Option("--config", help="Or the config of the run that has them.")]  # noqa: UP045
_Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face directory with safetensors.")]
_Checkpoints = Annotated[
    list[Path],
    typer.Argument(
        metavar="CHECKPOINT [CHECKPOINT2] OUT", help="A plain Megatron checkpoint, or the edge's and the cloud's."
    ),
]
_Like = Annotated[
    Path,
    typer.Option(
        "--like",
        metavar="DIR",
        help="Directory of the model: its config, tokenizer, names, files and dtypes are taken.",
    ),
]


def register(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.add_typer(app)


@app.command()
def merge(
    edge: _Edge, cloud: _Cloud, out: _Out, weights_only: _WeightsOnly = False, json_output: _Json = False
) -> None:
    """Join the checkpoints of both sites into one that stock Megatron loads at any parallel sizes.

    The newest step that both have is taken; weights and optimizer are kept bit for bit, random states are not.

    Example: ldt convert merge checkpoints/edge checkpoints/cloud merged

    Then: torchrun ... pretrain_gpt.py --load merged --ckpt-format torch_dist --no-load-rng ...
    """
    from ldt_schedules.megatron.converting import merging

    with _at_work() as progress:
        done = merging.merge(edge, cloud, out, progress, weights_only)
    _report(done, json_output)


@app.command()
def split(
    source: _Source,
    out: _Out,
    site: _Site,
    layers: _Layers = None,
    config: _Config = None,
    weights_only: _WeightsOnly = False,
    json_output: _Json = False,
) -> None:
    """Take one site's part out of a whole model's checkpoint; no byte of the other's tensors is in the result.

    A Hugging Face directory gives one again: the cloud's has its layers, config.json and an index, no tokenizer.

    Example: ldt convert split megatron-checkpoint --site cloud --layers 1,3,3,1 for-the-provider

    Example: ldt convert split Qwen3-8B --site edge --config run.yaml mine
    """
    from ldt_schedules.megatron.converting import huggingface_splitting, splitting
    from ldt_schedules.megatron.huggingface.directory import CONFIG

    holder_of = _holder_of(layers, config)
    with _at_work() as progress:
        if (source / CONFIG).is_file():
            done = huggingface_splitting.split_directory(source, site, holder_of, out, progress)
        else:
            done = splitting.split(source, site, holder_of, out, progress, weights_only)
    _report(done, json_output)


@app.command("from-hf")
def from_hf(directory: _Directory, out: _Out, json_output: _Json = False) -> None:
    """Make a plain Megatron checkpoint of a Hugging Face directory (Llama, Qwen2.5, Qwen3, Qwen2.5-VL).

    Example: ldt convert from-hf Qwen3-8B qwen3-8b-megatron
    """
    from ldt_schedules.megatron.converting.from_huggingface import from_huggingface

    with _at_work() as progress:
        done = from_huggingface(directory, out, progress)
    _report(done, json_output)


@app.command("to-hf")
def to_hf(paths: _Checkpoints, like: _Like, json_output: _Json = False) -> None:
    """Make a Hugging Face directory of a plain Megatron checkpoint, or of the edge's and the cloud's.

    Example: ldt convert to-hf checkpoints/edge checkpoints/cloud trained --like Qwen3-8B
    """
    from ldt_schedules.megatron.converting.to_huggingface import to_huggingface

    if not 2 <= len(paths) <= 3:
        raise ConfigError(
            f"to-hf takes one checkpoint, or the edge's and the cloud's, and OUT; {len(paths)} paths are given"
        )
    with _at_work() as progress:
        done = to_huggingface(paths[:-1], paths[-1], like, progress)
    _report(done, json_output)


@contextmanager
def _at_work() -> Iterator[Progress]:
    """A progress bar beside the result, where there is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    # "Apex is not installed" and a dozen more, when megatron-core is imported.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    console = Console(stderr=True)
    shown = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*shown, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("reading what is there", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, description="writing tensors", completed=done, total=total)

        yield progress


def _report(done: Converted, json_output: bool) -> None:
    if json_output:
        typer.echo(json.dumps(done.figures()))
        return
    step = f"step {done.iteration}, " if done.iteration else ""
    optimizer = "with its optimizer" if done.optimizer else "without optimizer"
    typer.echo(
        f"{done.out}: {step}{done.num_layers} layers, {done.num_tensors} tensors, {_size(done.num_bytes)}, {optimizer}"
    )
    for note in done.notes:
        typer.echo(f"note: {note}")


def _size(num_bytes: int) -> str:
    from rich.filesize import decimal

    return decimal(num_bytes)


def _holder_of(layers: str | None, config: Path | None) -> HolderOf:
    """Who holds which parameter, once it is known how many layers the model has."""
    if (layers is None) == (config is None):
        raise ConfigError("say how the model is split: --layers 1,3,3,1 or --config run.yaml, one of them")
    written = _written(layers) if layers is not None else None

    def holder_of(num_layers: int, num_vision_layers: int) -> Holder:
        from ldt_schedules.training.huggingface_model import holder

        split, layout = _from_config(config) if config is not None else _parsed(written, num_layers, num_vision_layers)
        counts = (sum(split),) if isinstance(split, tuple) else (sum(split.llm), sum(split.vit))
        if counts[0] != num_layers or sum(counts[1:]) != num_vision_layers:
            raise ConfigError(
                f"{config} splits {' and '.join(map(str, counts))} layers, the model has {num_layers}"
                + (f" and {num_vision_layers} of vision" if num_vision_layers else "")
            )
        return lambda name: holder(split, layout, name)

    return holder_of


def _from_config(path: Path) -> tuple[Any, Any]:
    from ldt_schedules.training.config import load_config

    loaded = load_config(path)
    if loaded.num_pipeline_ranks == 1:
        raise ConfigError(f"{path} has no cloud (sites.cloud.pipeline_ranks 0), so there is nothing to split")
    return loaded.lap_layers if loaded.has_vision else loaded.layer_split, loaded.layout


def _parsed(written: Any, num_layers: int, num_vision_layers: int) -> tuple[Any, Any]:
    from ldt_schedules.planning.lap_layers import LLM, parse_lap_layers
    from ldt_schedules.planning.layers import parse_layers, read_layers
    from ldt_schedules.planning.layout import Layout

    if num_vision_layers:
        of_language = written.get(LLM) if isinstance(written, dict) else None
        ranks = len(of_language) - 1 if isinstance(of_language, list) else 2
        laps = parse_lap_layers(written, num_vision_layers, num_layers, max(ranks, 2))
        return laps, laps.layout()
    ranks = max(len(read_layers(written)) - 1, 2)
    return parse_layers(written, num_layers, ranks), Layout.u(ranks)


def _written(text: str) -> Any:
    """A list, a layout, or both laps."""
    import yaml

    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        pass
    try:
        return yaml.safe_load(text) if text.lstrip().startswith(("{", "[")) else text
    except yaml.YAMLError:
        raise ConfigError(f"--layers {text!r} cannot be read; write 1,3,3,1 or Et|t*3|t*3|tL") from None
