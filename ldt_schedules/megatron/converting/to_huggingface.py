"""A whole model's checkpoint, or those of two sites, becomes a Hugging Face directory like the one that the model came from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.torch_dist_writer import disk_errors
from ldt_schedules.megatron.converting.assembling import Converted, Progress, appearing, check_out
from ldt_schedules.megatron.converting.parameter_keys import checkpoint_key
from ldt_schedules.megatron.converting.parts import EMBEDDING, Part, PartReader, listed, reading
from ldt_schedules.megatron.converting.sites import open_model, open_sites
from ldt_schedules.megatron.huggingface.directory import INDEX, HuggingFaceDirectory, open_directory
from ldt_schedules.megatron.huggingface.mapping import Pair
from ldt_schedules.megatron.huggingface.safetensors_file import DTYPES, TensorWriter, write_safetensors
from ldt_schedules.megatron.huggingface.saving import copy_others, saved_names
from ldt_schedules.megatron.huggingface.sizes import Sizes


def to_huggingface(checkpoints: list[Path], out: Path, like: Path, progress: Progress) -> Converted:
    """Write `out` with the files, names, shapes and dtypes of `like`, one parameter after the other.

    Args:
        checkpoints: a plain one, or the edge's and the cloud's.

    Raises:
        ConfigError: the checkpoint is not of the model that `like` describes; see also `sites` and `assembling.appearing`.
    """
    check_out(out)
    source = open_directory(like)
    first, *others = checkpoints
    model = open_sites(first, others[0], weights_only=True) if others else open_model(first, weights_only=True)
    rows = next(part.region.shape[0] for key, part in model.parts.items() if key.endswith(EMBEDDING))
    pairs = {name: pair for name, pair in source.pairs(Sizes.of(source.settings, rows)).items() if pair.tied_to is None}
    parts = _matched(model.parts, pairs, like)
    with appearing(out) as target:
        copy_others(source.path, target)
        if (source.path / INDEX).is_file():
            (target / INDEX).write_bytes((source.path / INDEX).read_bytes())
        num_bytes = _write(target, source, pairs, parts, progress)
    num_tensors = sum(len(saved_names(pair, source)) for pair in pairs.values())
    return Converted(str(out), model.iteration, model.num_layers(), num_tensors, num_bytes, optimizer=False)


def _matched(parts: Mapping[str, Part], pairs: Mapping[str, Pair], like: Path) -> dict[str, Part]:
    """Name in the whole model -> part. Norms may have their own name, or that of stock Megatron."""
    keys = {name: name if name in parts else checkpoint_key(name) for name in pairs}
    missing = sorted(set(keys.values()) - parts.keys())
    unknown = sorted(parts.keys() - set(keys.values()))
    shapes = [
        f"{keys[name]} {list(parts[keys[name]].region.shape)} instead of {list(pair.shape)}"
        for name, pair in pairs.items()
        if keys[name] in parts and torch.Size(parts[keys[name]].region.shape).numel() != torch.Size(pair.shape).numel()
    ]
    for what, names in (("lacks", missing), ("has besides", unknown), ("has other sizes:", shapes)):
        if names:
            raise ConfigError(
                f"the checkpoint is not of the model in {like}: it {what} {listed(names)}; give that model's"
            )
    return {name: parts[key] for name, key in keys.items()}


def _write(
    target: Path, source: HuggingFaceDirectory, pairs: Mapping[str, Pair], parts: Mapping[str, Part], progress: Progress
) -> int:
    """All files at once, each tensor where it belongs: q, k and v of a layer may lie in two files. The bytes written."""
    with ExitStack() as stack, reading() as reader:
        writers: dict[str, TensorWriter] = {}
        for file in sorted(set(source.files.values())):
            infos = {name: info for name, info in source.tensors.items() if source.files[name] == file}
            stack.enter_context(disk_errors(target / file.name))
            writers[file.name] = stack.enter_context(write_safetensors(target / file.name, infos))
        total, done = sum(info.num_bytes for info in source.tensors.values()), 0
        progress(0, total)
        for name, pair in pairs.items():
            for one, tensor in _tensors(source, pair, parts[name], reader):
                with disk_errors(target / source.files[one].name):
                    writers[source.files[one].name].put(one, tensor)
                done += tensor.nbytes
            progress(done, total)
    return done


def _tensors(
    source: HuggingFaceDirectory, pair: Pair, part: Part, reader: PartReader
) -> list[tuple[str, torch.Tensor]]:
    names = saved_names(pair, source)
    dtypes = [DTYPES[source.tensors[name].dtype] for name in names]
    made = pair.unpack([reader.tensor(part).reshape(pair.shape)], dtypes[: len(pair.names)])
    made += [made[0].to(dtype) for dtype in dtypes[len(made) :]]
    return list(zip(names, made, strict=True))
