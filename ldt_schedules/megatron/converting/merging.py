"""Two sites' checkpoints become one of stock Megatron: layers stacked, every key as Megatron-LM writes it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ldt_schedules.megatron.converting.assembling import (
    Converted,
    Progress,
    Tensor,
    check_out,
    no_state,
    write_checkpoint,
)
from ldt_schedules.megatron.converting.common_state import converted_state
from ldt_schedules.megatron.converting.parts import reading
from ldt_schedules.megatron.converting.sites import Model, open_sites

_NO_HEADS = (
    "the checkpoints do not say how many attention heads the model has, so Megatron-LM's script loads the result with "
    "--finetune only"
)


def merge(edge: Path, cloud: Path, out: Path, progress: Progress, weights_only: bool = False) -> Converted:
    """Write `out/iter_…`, one layer's tensor after the other.

    The schedule is in samples, as Megatron-LM counts; states of modules are empty in weights alone.

    Raises:
        ConfigError: see `sites.open_sites` and `assembling.appearing`.
    """
    check_out(out)
    model = open_sites(edge, cloud, weights_only)
    arguments = {**model.arguments, "num_layers": model.num_layers()}
    common = converted_state(model.states, arguments, optimizer=model.optimizer)
    with reading() as reader:
        tensors = {key: Tensor(part.num_bytes, partial(reader.tensor, part)) for key, part in model.parts.items()}
        objects = {key: no_state if weights_only else partial(reader.state, one) for key, one in model.objects.items()}
        write_checkpoint(out, model.iteration, tensors, objects, common, stacked=True, progress=progress)
    return _converted(out, model, arguments)


def _converted(out: Path, model: Model, arguments: dict[str, object]) -> Converted:
    notes = model.notes if "num_attention_heads" in arguments else (*model.notes, _NO_HEADS)
    return Converted(
        out=str(out),
        iteration=model.iteration,
        num_layers=model.num_layers(),
        num_tensors=len(model.parts),
        num_bytes=sum(part.num_bytes for part in model.parts.values()),
        optimizer=model.optimizer,
        notes=notes,
    )
