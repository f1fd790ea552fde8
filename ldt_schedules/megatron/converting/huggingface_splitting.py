"""One site's part of a Hugging Face directory: what a company may send its provider.

    edge     model-00001-of-00003.safetensors, config.json, tokenizer and all else
    cloud    model-00002-of-00003.safetensors, model-00003-of-00003.safetensors, config.json, preprocessor_config.json

A file for each pipeline rank. Either part has the index of the whole model, which names the other's tensors and has none of
their values; both parts in one directory are the model again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.torch_dist_writer import disk_errors
from ldt_schedules.megatron.converting.assembling import Converted, Progress, appearing, check_out
from ldt_schedules.megatron.converting.parts import layers_among
from ldt_schedules.megatron.converting.splitting import HolderOf, holds
from ldt_schedules.megatron.huggingface.directory import CONFIG, INDEX, HuggingFaceDirectory, open_directory
from ldt_schedules.megatron.huggingface.mapping import Pair
from ldt_schedules.megatron.huggingface.safetensors_file import write_safetensors
from ldt_schedules.megatron.huggingface.saving import Holder, copy_others, file_names, saved_names, write_index
from ldt_schedules.megatron.huggingface.sizes import Sizes
from ldt_schedules.topology import Site

_OF_THE_CLOUD = (CONFIG, "preprocessor_config.json")
"""Sizes of the model and of images, which a run of the cloud asks for."""


def split_directory(source: Path, site: Site, holder_of: HolderOf, out: Path, progress: Progress) -> Converted:
    """Write `out`, one tensor after the other.

    Raises:
        ConfigError: the directory is damaged, or of a model that is not known; the layers are not those of the model; see
            `assembling.appearing`.
    """
    check_out(out)
    directory = open_directory(source)
    settings = directory.settings
    holder = holder_of(settings["model"]["num_layers"], settings.get("vision", {}).get("num_layers", 0))
    pairs = {name: pair for name, pair in directory.pairs(Sizes.of(settings)).items() if pair.tied_to is None}
    mine = {name: pair for name, pair in pairs.items() if holds(holder, site, name)}
    if not mine:
        raise ConfigError(f"the {site} holds nothing of {source} with these layers; give it at least one layer")
    with appearing(out) as target:
        if site is Site.EDGE:
            copy_others(source, target)
        for name in _OF_THE_CLOUD if site is Site.CLOUD else ():
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        num_tensors, num_bytes = _write(target, directory, pairs, mine, holder, progress)
    return Converted(str(out), 0, len(layers_among(mine)), num_tensors, num_bytes, optimizer=False)


def _write(
    target: Path,
    directory: HuggingFaceDirectory,
    pairs: Mapping[str, Pair],
    mine: Mapping[str, Pair],
    holder: Holder,
    progress: Progress,
) -> tuple[int, int]:
    """Tensors and bytes that were written."""
    files = file_names(pairs, holder)
    held = {
        rank: [one for name in mine if holder(name) == rank for one in saved_names(mine[name], directory)]
        for rank in files
    }
    infos = {rank: {name: directory.tensors[name] for name in names} for rank, names in held.items() if names}
    total, done = sum(info.num_bytes for group in infos.values() for info in group.values()), 0
    progress(0, total)
    with directory.reading() as read:
        for rank, group in infos.items():
            path = target / files[rank]
            with disk_errors(path), write_safetensors(path, group) as writer:
                for name, info in group.items():
                    writer.put(name, read(name, slice(None), slice(None)).reshape(info.shape))
                    done += info.num_bytes
                    progress(done, total)
    write_index(target / INDEX, pairs, directory, {name: files[holder(name)] for name in pairs})
    return sum(map(len, infos.values())), done
