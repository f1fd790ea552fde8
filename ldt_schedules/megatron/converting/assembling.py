"""Writes a checkpoint from parts, one after the other: the last step of every conversion.

A directory appears under its name when everything in it is on the disk, or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.layer_keys import layer_key
from ldt_schedules.megatron.checkpoints.site_directory import sync_tree
from ldt_schedules.megatron.checkpoints.torch_dist_writer import ChunkWriter, file_name, write_common, write_index
from ldt_schedules.megatron.converting.parts import layer_counts, stacked_object_key
from ldt_schedules.megatron.converting.step_paths import directory_name, write_latest

Progress = Callable[[int, int], None]
"""Called with the bytes that are written and those that are to be, of tensors."""


def no_state() -> None:
    """Of a module that has none."""


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        iteration: 0 of weights that no run has trained.
        num_layers: of the language model, those that are in it.
        notes: what the user should know.
    """

    out: str
    iteration: int
    num_layers: int
    num_tensors: int
    num_bytes: int
    optimizer: bool
    notes: tuple[str, ...] = ()

    def figures(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Tensor:
    """To be written under a key with a layer's number, if it is in one."""

    num_bytes: int
    read: Callable[[], torch.Tensor]


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A directory to write to, which becomes `out` at the end; after an error nothing is left.

    Raises:
        ConfigError: `out` is not empty, or cannot be written.
    """
    out = out.resolve()  # `.` has no name
    check_out(out)
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        for directory in (*(path for path in part.rglob("*") if path.is_dir()), part):
            sync_tree(directory)
        os.rename(part, out)
        _sync_names(out.parent)
    except OSError as error:
        raise ConfigError(f"{error.filename or part} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sync_names(directory: Path) -> None:
    """To the disk: what is in a directory, not the content of that."""
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def check_out(out: Path) -> None:
    """Before long work. Raises ConfigError: it is not a new or empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not empty; give a new directory, so that nothing of it is lost")


def write_checkpoint(
    out: Path,
    iteration: int,
    tensors: Mapping[str, Tensor],
    objects: Mapping[str, Callable[[], Any]],
    common: dict[str, Any],
    *,
    stacked: bool,
    progress: Progress,
) -> None:
    """A directory with one step, in Megatron's format.

    Args:
        objects: states of modules: plain values, as `module_states` reads them, or `no_state`.
        stacked: layers under one key, as stock Megatron has them; else a key for each, as a site.
    """
    counts = layer_counts(tensors)
    with appearing(out) as part:
        step = part / directory_name(iteration)
        step.mkdir()
        with ChunkWriter(step, file_name(0)) as writer:
            _write_tensors(writer, tensors, counts if stacked else {}, progress)
            for key, value in objects.items():
                name = stacked_object_key(key, _layers_beside(key, counts)) if stacked else key
                writer.put_object(name, [value()])  # a list, as megatron-core does
        assert writer.written is not None
        write_common(step, common)
        write_index(step, [writer.written])
        write_latest(part, iteration)


def _write_tensors(
    writer: ChunkWriter, tensors: Mapping[str, Tensor], counts: Mapping[str, int], progress: Progress
) -> None:
    """`counts`: of the keys under which layers are stacked."""
    total, done = sum(one.num_bytes for one in tensors.values()), 0
    progress(0, total)
    for key, one in tensors.items():
        values, layer = one.read(), layer_key(key)
        if layer is not None and layer.stacked in counts:
            offsets = (layer.layer, *(0 for _ in values.shape))
            writer.put(layer.stacked, values[None], offsets, (counts[layer.stacked], *values.shape))
        else:
            writer.put(key, values)
        done += one.num_bytes
        progress(done, total)


def _layers_beside(object_key: str, counts: Mapping[str, int]) -> int:
    """How many layers the stack has in which an object stands; 0 if it is in none."""
    before = object_key.rpartition("layers.")[0]
    return next((count for key, count in counts.items() if key.rpartition("layers.")[0] == before), 0)
