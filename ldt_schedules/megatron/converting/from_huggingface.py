"""A Hugging Face directory becomes a checkpoint of stock Megatron: weights alone, no step of any run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ldt_schedules.megatron.converting.assembling import (
    Converted,
    Progress,
    Tensor,
    check_out,
    no_state,
    write_checkpoint,
)
from ldt_schedules.megatron.converting.common_state import converted_state
from ldt_schedules.megatron.converting.megatron_arguments import arguments_of_settings
from ldt_schedules.megatron.converting.parameter_keys import checkpoint_key, stateless_objects
from ldt_schedules.megatron.huggingface.directory import HuggingFaceDirectory, open_directory
from ldt_schedules.megatron.huggingface.loading import check_copies
from ldt_schedules.megatron.huggingface.mapping import Pair, Read
from ldt_schedules.megatron.huggingface.safetensors_file import DTYPES
from ldt_schedules.megatron.huggingface.sizes import Sizes


def from_huggingface(source: Path, out: Path, progress: Progress) -> Converted:
    """Write `out/release`, in the dtypes of the directory.

    Raises:
        ConfigError: the directory is damaged, or of a model that is not known; see `assembling.appearing`.
    """
    check_out(out)
    directory = open_directory(source)
    settings = directory.settings
    pairs = {name: pair for name, pair in directory.pairs(Sizes.of(settings)).items() if pair.tied_to is None}
    arguments = {**arguments_of_settings(settings["model"]), "padded_vocab_size": settings["vocab_size"]}
    common = converted_state([{"iteration": 0}], arguments, optimizer=False)
    with directory.reading() as read:
        tensors = {checkpoint_key(name): _tensor(directory, pair, read) for name, pair in pairs.items()}
        objects = dict.fromkeys(stateless_objects(pairs), no_state)
        write_checkpoint(out, 0, tensors, objects, common, stacked=True, progress=progress)
    return Converted(
        out=str(out),
        iteration=0,
        num_layers=settings["model"]["num_layers"],
        num_tensors=len(tensors),
        num_bytes=sum(one.num_bytes for one in tensors.values()),
        optimizer=False,
    )


def _tensor(directory: HuggingFaceDirectory, pair: Pair, read: Read) -> Tensor:
    dtype = _dtype(directory, pair)
    return Tensor(torch.Size(pair.shape).numel() * dtype.itemsize, _reading(directory, pair, dtype, read))


def _reading(directory: HuggingFaceDirectory, pair: Pair, dtype: torch.dtype, read: Read) -> Callable[[], torch.Tensor]:
    def whole() -> torch.Tensor:
        part, values = pair.part(pair.shape, 0, 1), torch.empty(pair.shape, dtype=dtype)
        part.fill(values, read)
        check_copies(directory, pair, part, read)
        return values

    return whole


def _dtype(directory: HuggingFaceDirectory, pair: Pair) -> torch.dtype:
    """Of the tensors that are joined; the widest, if they differ."""
    dtypes = [DTYPES[directory.tensors[name].dtype] for name in pair.names]
    widest = dtypes[0]
    for one in dtypes[1:]:
        widest = torch.promote_types(widest, one)
    return widest
