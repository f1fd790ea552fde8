"""Fills a process's parameters from a Hugging Face directory.

Each process opens the directory itself and reads the tensors that it holds, of those its tensor-parallel part, range by range:
no process ever has more than one range beside its parameters, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.megatron.huggingface.directory import HuggingFaceDirectory
from ldt_schedules.megatron.huggingface.mapping import Pair, Part, Read
from ldt_schedules.megatron.huggingface.sizes import Sizes

NamedParameters = Iterable[tuple[str, torch.Tensor]]
"""`(name in the whole model, parameter)`; a parameter that is tied may come under either name, or both."""


@dataclass(frozen=True)
class TensorParallel:
    """A process among those that share each layer.

    Attributes:
        group: its process group; only saving needs it, and only where `size` is above 1.
    """

    rank: int = 0
    size: int = 1
    group: Any = None


def load(
    directory: HuggingFaceDirectory,
    named_parameters: NamedParameters,
    sizes: Sizes,
    tensor_parallel: TensorParallel | None = None,
) -> None:
    """Fill each parameter in place, in its own dtype and on its own device.

    Raises:
        ConfigError: the directory does not fit the sizes (`HuggingFaceDirectory.pairs`), lacks a file that this process
            needs, or says that the embeddings are tied and holds two different ones.
        LdtError: a parameter is not in the table, or not of the shape that the table gives it.
    """
    place = tensor_parallel or TensorParallel()
    pairs = directory.pairs(sizes)
    parameters = list(named_parameters)
    parts = parts_of(parameters, pairs, place)
    elsewhere = directory.elsewhere
    needed = sorted({elsewhere[one].name for part in parts.values() for one in part.names if one in elsewhere})
    if needed:
        raise ConfigError(
            f"{directory.path} lacks files with tensors of this process: {', '.join(needed)}; copy them there"
        )
    with directory.reading() as read, torch.no_grad():
        for name, parameter in parameters:
            parts[name].fill(parameter, read)
            check_copies(directory, pairs[name], parts[name], read)


def parts_of(
    parameters: Iterable[tuple[str, torch.Tensor]], pairs: Mapping[str, Pair], place: TensorParallel
) -> dict[str, Part]:
    """What this process holds of each parameter.

    Raises:
        LdtError: parameters that are not in the table, or of another shape; all of them.
    """
    parts, problems = {}, []
    for name, parameter in parameters:
        if name not in pairs:
            problems.append(f"{name} is not in the table")
            continue
        try:
            parts[name] = pairs[name].part(parameter.shape, place.rank, place.size)
        except LdtError as error:
            problems.append(str(error))
    if problems:
        raise LdtError("the model's parameters do not fit the directory's table:\n  " + "\n  ".join(problems))
    return parts


def check_copies(directory: HuggingFaceDirectory, pair: Pair, part: Part, read: Read) -> None:
    """transformers would untie two different ones without a word; ours would lose one. Raises ConfigError: two differ."""
    for copy in (copy for copy in pair.copies if copy in directory.tensors):
        for one in (one for one in part.rows if one.source is not None):
            rows = slice(one.start, one.stop)
            first, second = (read(name, rows, part.columns) for name in (part.names[one.source or 0], copy))
            if not torch.equal(first, second):
                raise ConfigError(
                    f"{directory.path}: config.json ties the embeddings, but {copy} differs from "
                    f"{part.names[one.source or 0]}. Set tie_word_embeddings to false there, or remove {copy}"
                )
