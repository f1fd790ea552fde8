"""Edge and cloud checkpoints read as one model: the same step of the same run, every tensor in one of them."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.site_directory import MANIFEST, Manifest, problems_of, read_manifest
from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint
from ldt_schedules.megatron.converting.common_state import in_samples, same_step
from ldt_schedules.megatron.converting.megatron_arguments import arguments_of_checkpoint, arguments_of_settings
from ldt_schedules.megatron.converting.parts import (
    EMBEDDING,
    ObjectPart,
    Part,
    has_embedding,
    incomplete,
    is_of_optimizer,
    layers_among,
    listed,
    objects_of,
    parts_of,
)
from ldt_schedules.megatron.converting.step_paths import Step, common_step, find_step

_T = TypeVar("_T")


@dataclass(frozen=True)
class Model:
    """A whole model's checkpoint, in one piece or two.

    Attributes:
        parts: keys of layers are numbered.
        states: common states; the edge's first. With the optimizer, its schedule is in samples.
        optimizer: its state is whole, and wanted.
        arguments: of the model, in Megatron-LM's names, as far as the checkpoint says.
        notes: what was left out.
    """

    iteration: int
    parts: dict[str, Part]
    objects: dict[str, ObjectPart]
    states: tuple[dict[str, Any], ...]
    arguments: dict[str, Any]
    optimizer: bool
    notes: tuple[str, ...] = ()

    def num_layers(self, vision: bool = False) -> int:
        """Of the language model, or of the vision encoder."""
        return len(layers_among(self.parts, vision))


def open_model(path: Path, weights_only: bool = False) -> Model:
    """A plain checkpoint.

    Raises:
        ConfigError: it is none, holds a part of a model only, or is damaged.
    """
    step = find_step(path)
    checkpoint = open_checkpoint(step.path)
    parts = parts_of(checkpoint, weights_only)
    if not has_embedding(parts):
        raise ConfigError(
            f"{step.path} has no {EMBEDDING}: it holds a part of a model, the cloud's perhaps; give a whole one"
        )
    common = checkpoint.common
    arguments = {**_settings(step, None), **arguments_of_checkpoint(common)}
    missing = incomplete(_weights(parts), arguments.get("num_layers"))
    if missing:
        raise ConfigError(
            f"{step.path} is no whole model: missing is {listed(missing)}; if it is the edge's, merge it with the cloud's"
        )
    iteration = int(common.get("iteration", step.iteration))
    optimizer = not weights_only and "optimizer" in common
    state = in_samples(common, _manifest(step)) if optimizer else common
    return Model(iteration, parts, objects_of(checkpoint), (state,), arguments, optimizer)


def open_sites(edge: Path, cloud: Path, weights_only: bool = False) -> Model:
    """What two sites saved of one step.

    Raises:
        ConfigError: they are swapped, of different steps or runs, do not make a whole model together, or are damaged; or
            there are links among their files.
    """
    steps = common_step(edge, cloud)
    for step in steps:
        _refuse_links(step)
    both = [open_checkpoint(step.path) for step in steps]
    manifests = [_manifest(step) for step in steps]
    parts = [parts_of(one, weights_only) for one in both]
    _check_places(steps, [has_embedding(one) for one in parts])
    _check_run(steps, manifests)
    states = [one.common for one in both]
    same_step(states)
    arguments = {**_settings(steps[0], manifests[0]), **arguments_of_checkpoint(states[0])}
    merged, notes = _joined(steps, parts, arguments.get("num_layers"))
    for step, manifest in zip(steps, manifests, strict=True):
        problems = [] if manifest is None else problems_of(step.path, manifest.files.items())
        if problems:
            raise ConfigError(f"{problems[0]}; copy the checkpoint again")
    objects = _united(steps, *map(objects_of, both))
    iteration = int(states[0].get("iteration", steps[0].iteration))
    optimizer = not weights_only and not notes and any("optimizer" in state for state in states)
    if optimizer:
        states[0] = in_samples(states[0], manifests[0])  # the schedule is taken from the edge
    return Model(iteration, merged, objects, tuple(states), arguments, optimizer, notes)


def _joined(
    steps: tuple[Step, Step], parts: list[dict[str, Part]], expected: int | None
) -> tuple[dict[str, Part], tuple[str, ...]]:
    whole = _united(steps, *parts)
    missing = incomplete(_weights(whole), expected)
    if missing:
        raise ConfigError(
            f"{steps[0].path} and {steps[1].path} make no whole model: missing is {listed(missing)}; give two sites of one split"
        )
    if incomplete(filter(is_of_optimizer, whole), expected) or _is_frozen_embedding(whole):
        weights = {key: part for key, part in whole.items() if not is_of_optimizer(key)}
        return weights, ("the optimizer is left out: it has no state of layers that were not trained",)
    return whole, ()


def _united(steps: tuple[Step, Step], edge: Mapping[str, _T], cloud: Mapping[str, _T]) -> dict[str, _T]:
    """Raises ConfigError: both hold the same. Neither site may replace what is the other's."""
    twice = sorted(edge.keys() & cloud.keys())
    if twice:
        raise ConfigError(f"{steps[0].path} and {steps[1].path} both hold {listed(twice)}; give two sites of one split")
    return {**edge, **cloud}


def _refuse_links(step: Step) -> None:
    """What came from another site might name files of this one. Raises ConfigError: there are links, pipes or devices."""
    for path in sorted(step.path.iterdir()):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ConfigError(
                f"{path} is a link, a pipe or a device, not a file; put a file with the content in its place"
            )


def _is_frozen_embedding(whole: dict[str, Part]) -> bool:
    """Stock Megatron trains all of a model of text; of a vision-language model a run may leave parts alone."""
    states = [key for key in whole if is_of_optimizer(key)]
    return EMBEDDING in whole and bool(states) and not any(key.endswith(EMBEDDING) for key in states)


def _weights(parts: dict[str, Part]) -> list[str]:
    return [key for key in parts if not is_of_optimizer(key)]


def _check_places(steps: tuple[Step, Step], embeddings: list[bool]) -> None:
    edge, cloud = (step.path for step in steps)
    if embeddings == [False, True]:
        raise ConfigError(f"{cloud} is the edge's (it has the embedding) and {edge} the cloud's; give the edge's first")
    if embeddings == [True, True]:
        raise ConfigError(
            f"{edge} and {cloud} both have the embedding, so neither is the cloud's; give the edge's and the cloud's"
        )
    if embeddings == [False, False]:
        raise ConfigError(
            f"neither {edge} nor {cloud} has the embedding, so neither is the edge's; give the edge's first"
        )


def _check_run(steps: tuple[Step, Step], manifests: list[Manifest | None]) -> None:
    runs = {manifest.run for manifest in manifests if manifest is not None}
    if len(runs) > 1:
        raise ConfigError(f"{steps[0].path} and {steps[1].path} are of different runs; give two sites of one run")


def _manifest(step: Step) -> Manifest | None:
    """None of a checkpoint that Megatron-LM's own loop has saved."""
    return read_manifest(step.path) if (step.path / MANIFEST).is_file() else None


def _settings(step: Step, manifest: Manifest | None) -> dict[str, Any]:
    """What a site's manifest says of the model, in Megatron-LM's names."""
    manifest = manifest or _manifest(step)
    if manifest is None:
        return {}
    start = "model."
    model = {key.removeprefix(start): value for key, value in manifest.settings.items() if key.startswith(start)}
    return {**arguments_of_settings(model), "consumed_train_samples": manifest.consumed_samples}
