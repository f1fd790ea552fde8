"""Writes a split model as a Hugging Face directory.

    edge    model-00001-of-00003.safetensors, config.json, tokenizer and processor files, model.safetensors.index.json
    cloud   model-00002-of-00003.safetensors, model-00003-of-00003.safetensors

Each pipeline rank writes one file, of what it holds. The index names the file of every tensor, and the edge can write it alone:
the table tells all names, the split who holds them. So what crosses between the sites is nothing; the user copies the cloud's
files into the edge's directory and has a whole model. Tensors have the names, shapes and dtypes of the directory from which the
model came: what was widened when it was loaded, and has not learned, is narrowed without loss.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.megatron.huggingface.directory import INDEX, SINGLE, HuggingFaceDirectory
from ldt_schedules.megatron.huggingface.loading import NamedParameters, TensorParallel, parts_of
from ldt_schedules.megatron.huggingface.mapping import Pair
from ldt_schedules.megatron.huggingface.safetensors_file import DTYPES, TensorInfo, TensorWriter, write_safetensors
from ldt_schedules.megatron.huggingface.sizes import Sizes

EDGE_RANK = 0
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*")

Holder = Callable[[str], int]
"""Megatron's name of a parameter -> the pipeline rank that holds it."""


def save(
    target: Path,
    source: HuggingFaceDirectory,
    named_parameters: NamedParameters,
    sizes: Sizes,
    holder: Holder,
    pipeline_rank: int,
    tensor_parallel: TensorParallel | None = None,
) -> None:
    """Write this process's part of the directory `target`.

    Called by every tensor-parallel process of one replica (data-parallel and context-parallel rank 0); the first of each
    pipeline rank writes, with one gather for each parameter that is cut. The edge adds the index, last.

    Args:
        target: made if need be; see `check_target`.
        source: the directory from which the model came.

    Raises:
        LdtError: the parameters are not those that `holder` says this rank has, or do not fit the table.
        ConfigError: `check_target` refuses.
    """
    place = tensor_parallel or TensorParallel()
    pairs, given = source.pairs(sizes), dict(named_parameters)
    parts_of(given.items(), pairs, place)
    # A tied weight is one parameter: it may come under either name, and is saved under its first.
    parameters = {pairs[name].tied_to or name: given[name] for name in sorted(given)}
    expected = {name for name in _saved(pairs) if holder(name) == pipeline_rank}
    if expected != set(parameters):
        raise LdtError(
            f"pipeline rank {pipeline_rank} does not hold what it should save: missing "
            f"{sorted(expected - set(parameters))}, of others {sorted(set(parameters) - expected)}"
        )
    if place.rank == 0:
        check_target(target, source)
        target.mkdir(parents=True, exist_ok=True)
        files = file_names(pairs, holder)
        if pipeline_rank in files:
            infos = {name: source.tensors[name] for one in parameters for name in saved_names(pairs[one], source)}
            with write_safetensors(target / files[pipeline_rank], infos) as writer:
                _each(parameters, pairs, place, source, writer)
        if pipeline_rank == EDGE_RANK:
            copy_others(source.path, target)
            write_index(target / INDEX, pairs, source, {name: files[holder(name)] for name in _saved(pairs)})
    else:
        _each(parameters, pairs, place, source, None)


def check_target(target: Path, source: HuggingFaceDirectory) -> None:
    """To be asked before training, too: after it, a refusal costs the result.

    Raises:
        ConfigError: `target` is the source, a file, or holds a model that readers would take instead of ours.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; name a directory to save to")
    if target.exists() and target.samefile(source.path):
        raise ConfigError(f"{target} is the directory from which the model is loaded; save to another one")
    if (target / SINGLE).exists():
        raise ConfigError(f"{target} holds a {SINGLE}, which would be read instead of what is saved; remove it")


def file_names(pairs: Mapping[str, Pair], holder: Holder) -> dict[int, str]:
    """Pipeline rank -> its file; ranks that hold nothing have none, and are not counted."""
    ranks = sorted({holder(name) for name in _saved(pairs)})
    return {rank: f"model-{i:05d}-of-{len(ranks):05d}.safetensors" for i, rank in enumerate(ranks, start=1)}


def _saved(pairs: Mapping[str, Pair]) -> list[str]:
    return [name for name, pair in pairs.items() if pair.tied_to is None]


def saved_names(pair: Pair, source: HuggingFaceDirectory) -> tuple[str, ...]:
    """Of a pair's tensors, and of the copies that the source has."""
    return pair.names + tuple(copy for copy in pair.copies if copy in source.tensors)


def _each(
    parameters: Mapping[str, torch.Tensor],
    pairs: Mapping[str, Pair],
    place: TensorParallel,
    source: HuggingFaceDirectory,
    writer: TensorWriter | None,
) -> None:
    """Gather and write one parameter after the other; without a writer, send this process's part of each."""
    for name, parameter in parameters.items():
        pair = pairs[name]
        parts = _gather(parameter.detach(), pair, place)
        if writer is None:
            continue
        names = saved_names(pair, source)
        tensors = pair.unpack(parts, [DTYPES[source.tensors[one].dtype] for one in pair.names])
        tensors += [tensors[0].to(DTYPES[source.tensors[copy].dtype]) for copy in names[len(tensors) :]]
        for one, tensor in zip(names, tensors, strict=True):
            writer.put(one, tensor)
        del tensors, tensor, parts  # before the next one is made: an embedding is a large part of the model


def _gather(values: torch.Tensor, pair: Pair, place: TensorParallel) -> list[torch.Tensor]:
    """Every tensor-parallel process's part, on the first of them; elsewhere an empty list.

    As bytes: no backend has to know the dtype.
    """
    if pair.cut_dim(values.shape, place.size) is None:
        return [values]
    mine = values.contiguous().view(torch.uint8)
    first = place.rank == 0
    received = [torch.empty_like(mine) for _ in range(place.size)] if first else None
    dist.gather(mine, received, dst=dist.get_global_rank(place.group, 0), group=place.group)
    return [one.view(values.dtype) for one in received or ()]


def copy_others(source: Path, target: Path) -> None:
    """Everything of a model that is not its weights: config, tokenizer, processor, chat template."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.is_file() and not path.name.endswith(".index.json"):
                partial = target / f".{path.name}.part"
                shutil.copyfile(path, partial)
                os.replace(partial, target / path.name)


def write_index(path: Path, pairs: Mapping[str, Pair], source: HuggingFaceDirectory, files: Mapping[str, str]) -> None:
    """`files`: Megatron's name of each parameter that is saved -> its file."""
    saved = {one: file for name, file in files.items() for one in saved_names(pairs[name], source)}
    infos: list[TensorInfo] = [source.tensors[name] for name in saved]
    content = {
        "metadata": {"total_size": sum(info.num_bytes for info in infos)},
        "weight_map": dict(sorted(saved.items())),
    }
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
