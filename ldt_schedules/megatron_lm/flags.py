"""Our argument group on Megatron's command line, and those of Megatron's flags that the two sites need otherwise.

Parsed before Megatron parses anything, and with the standard library alone: what comes out decides with which
environment and which arguments Megatron starts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layers import parse_layers
from ldt_schedules.topology import Site

SWITCH = "--layerwise-disaggregated-training"
DEFAULT_TIMEOUT_S = 600.0
DEFAULT_SILENCE_S, DEFAULT_QUIET_S = 15.0, 30.0
DEFAULT_RUN_DIR = "ldt_run"

DESCRIPTION = """\
Flags of this project, beside Megatron's own. One command line serves both sites: each takes from it what is its own.
--tensor-model-parallel-size is the cloud's, --pipeline-model-parallel-size counts the edge (P = 1 edge + cloud stages)."""


@dataclass(frozen=True)
class Flags:
    """What the two sites are made from. Names without `ldt_` are Megatron's own flags.

    Attributes:
        layers: `(head, cloud 1, ..., tail)`.
        site: as declared; None when one launcher starts both sites.
        edge_world_size, cloud_world_size: processes of a site, where declared.
        edge_tensor_size, cloud_tensor_size: tensor-parallel sizes.
        link: `(host, port)` where the cloud's first process listens; None: found by the launcher's own store.
        plan: file of a schedule table; None: `schedule` makes the tables.
        others: all other arguments, as the user wrote them, in order.
        notes: what was accepted and changes nothing, for the console.
    """

    pipeline_ranks: int
    num_layers: int
    layers: tuple[int, ...]
    site: Site | None
    edge_world_size: int | None
    cloud_world_size: int | None
    edge_tensor_size: int
    cloud_tensor_size: int
    context_size: int
    sequence_parallel: bool
    tied: bool
    schedule: str
    plan: str | None
    link: tuple[str, int] | None
    link_backend: str
    timeout_s: float
    silence_s: float
    quiet_s: float
    run_dir: str
    others: tuple[str, ...]
    notes: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    """Tells mistakes as this project does, instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `ldt launch --help` lists the flags")


def parser() -> argparse.ArgumentParser:
    """The argument group, for parsing and for `--help`."""
    made = _Parser(prog="ldt launch SCRIPT", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    group = made.add_argument_group("layerwise-disaggregated training (LDT)", DESCRIPTION)
    group.add_argument(SWITCH, action="store_true", help="Train over two sites. Without it nothing is changed.")
    group.add_argument("--ldt-site", choices=[str(site) for site in Site], help="Which site this launch is.")
    group.add_argument(
        "--ldt-edge-world-size",
        type=int,
        metavar="N",
        help="Processes of the edge. With one launch for both sites: its first N processes are the edge (default: "
        "edge TP x context size, one replica).",
    )
    group.add_argument(
        "--ldt-cloud-world-size",
        type=int,
        metavar="N",
        help="Processes of the cloud, where the sites are launched apart and differ in data-parallel size.",
    )
    group.add_argument(
        "--ldt-layers",
        "--num-layer-list",
        dest="ldt_layers",
        metavar="LIST",
        help="Layers of head, cloud stages and tail: 2,12,12,2, or Megatron's layout Et*2|t*12|t*12|t*2L. Default: even.",
    )
    group.add_argument(
        "--ldt-edge-tensor-model-parallel-size", type=int, metavar="N", help="TP of the edge. Default: as the cloud's."
    )
    group.add_argument(
        "--ldt-schedule", default="ldt_1f1b", metavar="NAME", help="Planner, see `ldt plan --help`. Default: ldt_1f1b."
    )
    group.add_argument("--ldt-plan", metavar="FILE", help="Run this table (from `ldt plan`) instead of a planner's.")
    group.add_argument(
        "--ldt-link",
        metavar="HOST:PORT",
        help="Where the cloud's first process listens. Needed when the sites are launched apart.",
    )
    group.add_argument(
        "--ldt-link-backend",
        default="auto",
        choices=["auto", "gloo", "nccl", "hccl"],
        help="How tensors cross: the device's own way, or gloo through host memory where the sites' devices differ.",
    )
    group.add_argument(
        "--ldt-timeout-s",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help=f"Longest wait for the other site, in seconds. Default: {DEFAULT_TIMEOUT_S:g}.",
    )
    _add_vigilance(group)
    return made


def _add_vigilance(group: argparse._ArgumentGroup) -> None:
    """How the processes look after each other, and what they keep of a run."""
    group.add_argument(
        "--ldt-silence-s",
        type=float,
        default=DEFAULT_SILENCE_S,
        metavar="S",
        help="A process that shows no sign of life for so long is taken for lost, and all stop; 0: never. "
        f"Default: {DEFAULT_SILENCE_S:g}.",
    )
    group.add_argument(
        "--ldt-quiet-s",
        type=float,
        default=DEFAULT_QUIET_S,
        metavar="S",
        help=f"A process that waits for so long says what for; 0: never. Default: {DEFAULT_QUIET_S:g}.",
    )
    group.add_argument(
        "--ldt-run-dir",
        default=DEFAULT_RUN_DIR,
        metavar="DIR",
        help="Where each process keeps its ledger of what crossed (`ldt audit DIR`) and, if the run fails, what it did last "
        f"(`ldt doctor --post-mortem`). Default: {DEFAULT_RUN_DIR}.",
    )


def _with_megatron_flags() -> argparse.ArgumentParser:
    """The same with the flags of Megatron's that a site gets in another form than the user wrote them."""
    made = parser()
    made.add_argument("--pipeline-model-parallel-size", type=int)
    made.add_argument("--tensor-model-parallel-size", type=int, default=1)
    made.add_argument("--context-parallel-size", type=int, default=1)
    made.add_argument("--num-layers", type=int)
    made.add_argument("--sequence-parallel", action="store_true")
    made.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    made.add_argument("--num-virtual-stages-per-pipeline-rank", type=int)
    return made


def is_on(arguments: Sequence[str]) -> bool:
    """Is the switch on this command line?"""
    return SWITCH in arguments


def parse(arguments: Sequence[str]) -> Flags:
    """Read the whole command line of Megatron's script (without the script's name).

    Raises:
        ConfigError: a flag of ours that cannot be read, or two that contradict each other.
    """
    found, others = _with_megatron_flags().parse_known_args(list(arguments))
    ranks = found.pipeline_model_parallel_size
    if ranks is None or ranks < 2:
        raise ConfigError(
            f"--pipeline-model-parallel-size is {1 if ranks is None else ranks}; it counts the edge, so a split model "
            f"has at least 2 (edge and one cloud stage): give 2 or more, or leave {SWITCH} out"
        )
    if found.num_layers is None:
        raise ConfigError("--num-layers is missing; both sites need it on the command line")
    return Flags(
        pipeline_ranks=ranks,
        num_layers=found.num_layers,
        layers=_layers(found.ldt_layers, found.num_layers, ranks),
        site=None if found.ldt_site is None else Site(found.ldt_site),
        edge_world_size=found.ldt_edge_world_size,
        cloud_world_size=found.ldt_cloud_world_size,
        edge_tensor_size=found.ldt_edge_tensor_model_parallel_size or found.tensor_model_parallel_size,
        cloud_tensor_size=found.tensor_model_parallel_size,
        context_size=found.context_parallel_size,
        sequence_parallel=found.sequence_parallel,
        tied=not found.untie_embeddings_and_output_weights,
        schedule=found.ldt_schedule,
        plan=found.ldt_plan,
        link=None if found.ldt_link is None else _address(found.ldt_link),
        link_backend=found.ldt_link_backend,
        timeout_s=found.ldt_timeout_s,
        silence_s=found.ldt_silence_s,
        quiet_s=found.ldt_quiet_s,
        run_dir=found.ldt_run_dir,
        others=tuple(others),
        notes=tuple(_notes(found.num_virtual_stages_per_pipeline_rank)),
    )


def _layers(text: str | None, num_layers: int, ranks: int) -> tuple[int, ...]:
    value: str | list[int] | None = text
    if text is not None and set(text) <= set("0123456789, "):
        try:
            value = [int(number) for number in text.split(",")]
        except ValueError:
            raise ConfigError(f"--ldt-layers {text!r}: write whole numbers with commas between, as 2,12,12,2") from None
    try:
        return parse_layers(value, num_layers, ranks)
    except ScheduleError as error:
        raise ConfigError(f"--ldt-layers, --num-layers, --pipeline-model-parallel-size: {error}") from None


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--ldt-link {text!r}: write HOST:PORT, as cloud.example.org:29600")
    return host.strip("[]"), int(port)


def _notes(virtual_stages: int | None) -> list[str]:
    if virtual_stages is None:
        return []
    if virtual_stages != 2:
        raise ConfigError(
            f"--num-virtual-stages-per-pipeline-rank is {virtual_stages}; a split model has no virtual pipeline: "
            "leave it out (2, as MindSpeed's launch scripts have it, is accepted and ignored)"
        )
    return ["--num-virtual-stages-per-pipeline-rank 2 is not needed and ignored: the edge holds head and tail anyway"]
