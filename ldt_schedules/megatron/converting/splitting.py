"""One site's part of a plain Megatron checkpoint: a key for each of its layers, and no byte of the other site's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.converting.assembling import (
    Converted,
    Progress,
    Tensor,
    check_out,
    no_state,
    write_checkpoint,
)
from ldt_schedules.megatron.converting.common_state import converted_state
from ldt_schedules.megatron.converting.parts import layers_among, parameter_key, reading
from ldt_schedules.megatron.converting.sites import open_model
from ldt_schedules.megatron.huggingface.saving import EDGE_RANK, Holder
from ldt_schedules.topology import Site

HolderOf = Callable[[int, int], Holder]
"""Layers of the language model and of the vision encoder -> who holds which parameter. Raises if they do not fit."""


def split(
    source: Path, site: Site, holder_of: HolderOf, out: Path, progress: Progress, weights_only: bool = False
) -> Converted:
    """Write `out/iter_…` with what `site` holds, with its part of the optimizer.

    The schedule stays in samples, as Megatron-LM counts; a run that starts from it, where there is no manifest, makes steps
    of them. States of modules are empty in weights alone.

    Raises:
        ConfigError: see `sites.open_model` and `assembling.appearing`; or the layers are not those of the model.
    """
    check_out(out)
    model = open_model(source, weights_only)
    holder = holder_of(model.num_layers(), model.num_layers(vision=True))
    # Objects are of modules in the same places as parameters.
    mine = {key: part for key, part in model.parts.items() if holds(holder, site, parameter_key(key))}
    objects = {key: part for key, part in model.objects.items() if holds(holder, site, key)}
    if not mine:
        raise ConfigError(f"the {site} holds nothing of {source} with these layers; give it at least one layer")
    common = converted_state(model.states, model.arguments, optimizer=model.optimizer)
    with reading() as reader:
        tensors = {key: Tensor(part.num_bytes, partial(reader.tensor, part)) for key, part in mine.items()}
        states = {key: no_state if weights_only else partial(reader.state, one) for key, one in objects.items()}
        write_checkpoint(out, model.iteration, tensors, states, common, stacked=False, progress=progress)
    num_bytes = sum(part.num_bytes for part in mine.values())
    return Converted(str(out), model.iteration, len(layers_among(mine)), len(mine), num_bytes, model.optimizer)


def holds(holder: Holder, site: Site, name: str) -> bool:
    """Is a parameter of the whole model on that site?"""
    return (holder(name) == EDGE_RANK) == (site is Site.EDGE)
