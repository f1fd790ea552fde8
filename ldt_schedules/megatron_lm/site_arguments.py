"""One site's plain Megatron command line, made from the user's.

Everything the user wrote stays as it is, but for what follows:

    both     parallel sizes are the site's own; --save and --load get the site's name as a folder of their own
    cloud    no data, no tokenizer file, no TensorBoard or W&B: nothing there has any use for them, and a path that it
             was never given is a path that it cannot open
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from ldt_schedules.megatron_lm.flags import Flags
from ldt_schedules.megatron_lm.sites import Sites
from ldt_schedules.topology import Site

EDGE_ONLY_FLAGS = (
    "--data-path",
    "--train-data-path",
    "--valid-data-path",
    "--test-data-path",
    "--data-args-path",
    "--per-split-data-args-path",
    "--per-dataset-sequences-path",
    "--data-cache-path",
    "--split",
    "--tokenizer-type",
    "--tokenizer-model",
    "--tokenizer-metadata",
    "--tokenizer-special-tokens",
    "--tokenizer-hf-use-fast",
    "--tokenizer-hf-include-special-tokens",
    "--tiktoken-pattern",
    "--tiktoken-num-special-tokens",
    "--tiktoken-special-tokens",
    "--vocab-file",
    "--vocab-size",
    "--vocab-extra-ids",
    "--merge-file",
    "--tensorboard-dir",
    "--wandb-project",
    "--wandb-exp-name",
    "--wandb-save-dir",
    "--wandb-entity",
)
"""The cloud's command line does not have them; each takes one value or several."""

SITE_FOLDER_FLAGS = ("--save", "--load")
_NO_VOCABULARY = "128"  # rows of an embedding that the cloud does not have


def site_arguments(sites: Sites) -> list[str]:
    """The arguments with which this process's Megatron starts."""
    flags, site = sites.flags, sites.place.site
    size = sites.topology.size(site)
    kept = list(flags.others)
    if site is Site.CLOUD:
        kept = list(without(kept, EDGE_ONLY_FLAGS))
    given = given_flags(kept)
    if holds_a_whole_model(given.get("--load")) and "--no-load-rng" not in given:
        # Its random states are those of another layout; Megatron 0.12 would stop over them.
        kept.append("--no-load-rng")
    for flag in SITE_FOLDER_FLAGS:
        kept = list(_in_site_folder(kept, flag, site))
    made = ["--num-layers", str(flags.num_layers), "--tensor-model-parallel-size", str(size.tensor)]
    made += ["--pipeline-model-parallel-size", str(sites.topology.pipeline_size(site))]
    if flags.context_size > 1:
        made += ["--context-parallel-size", str(flags.context_size)]
    if size.sequence_parallel:
        made.append("--sequence-parallel")
    if "--rerun-mode" not in given:
        # A second run of a step on one site alone would leave the sites at different steps.
        made += ["--rerun-mode", "disabled"]
    if site is Site.CLOUD:
        made += ["--untie-embeddings-and-output-weights", "--tokenizer-type", "NullTokenizer"]
        made += ["--vocab-size", _NO_VOCABULARY, *_divisible(flags)]
        made += [] if "--mock-data" in kept else ["--mock-data"]  # of which it opens nothing either
    elif not flags.tied:
        made.append("--untie-embeddings-and-output-weights")
    return kept + made


def _divisible(flags: Flags) -> list[str]:
    """Megatron divides the model's layers by its pipeline size, whatever layers a rank is given afterwards."""
    stages = flags.pipeline_ranks - 1
    if flags.num_layers % stages == 0:
        return []
    return ["--decoder-first-pipeline-num-layers", str(flags.num_layers % (stages - 1) or stages - 1)]


def without(arguments: Sequence[str], flags: Sequence[str]) -> Iterator[str]:
    """The arguments less these flags and their values (`--flag a b` or `--flag=a`)."""
    skipping = False
    for argument in arguments:
        if _is_flag(argument):
            skipping = argument.partition("=")[0] in flags
        if not skipping:
            yield argument


def given_flags(arguments: Sequence[str]) -> dict[str, str | None]:
    """Flag -> its first value (None: it has none), from a command line."""
    given: dict[str, str | None] = {}
    for argument, following in pairwise([*arguments, "--"]):
        if _is_flag(argument):
            name, equals, value = argument.partition("=")
            given[name] = value if equals else None if _is_flag(following) else following
    return given


def _is_flag(argument: str) -> bool:
    """A flag, not a value: `--lr`; `-1` and `-0.5` are values."""
    return argument.startswith("--")


def _in_site_folder(arguments: Sequence[str], flag: str, site: Site) -> Iterator[str]:
    """`--load DIR` means DIR/edge and DIR/cloud, or DIR itself where it holds a checkpoint of the whole model."""
    is_value = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if is_value:
            yield _site_folder(argument, flag, site)
        elif name == flag and equals:
            yield f"{flag}={_site_folder(value, flag, site)}"
        else:
            yield argument
        is_value = argument == flag


def _site_folder(path: str, flag: str, site: Site) -> str:
    return path if flag == "--load" and holds_a_whole_model(path) else str(Path(path) / site.value)


def holds_a_whole_model(folder: str | None) -> bool:
    """Has an unsplit run saved its checkpoints right there? A split run saves one folder deeper."""
    return folder is not None and (Path(folder) / "latest_checkpointed_iteration.txt").exists()
