"""Reading megatron-core's distributed checkpoints (`torch_dist`): what is in one, and regions of its tensors.

    .metadata       an index, pickled: key -> shape, dtype and chunks; chunk -> file, first byte, length
    __*.distcp      chunks, each as `torch.save` writes a tensor, one behind the other
    common.pt       what is equal in all processes: optimizer groups, schedule, iteration
    metadata.json   the format's name and version

megatron-core's own reader asks for what a whole world of processes holds, all of each key, and executes the index's and the
common state's pickles. A site holds a part, and may read what another site wrote. So this reader takes any region of any key,
whichever way the tensors were cut when they were saved, and runs nothing (`safe_pickle.py`).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints import safe_pickle
from ldt_schedules.megatron.checkpoints.layer_keys import layer_key

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
BACKEND = "torch_dist"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """Where something lies: `length` bytes of `file` from `start` on."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor that was saved by one process; `offsets` and `shape` have the tensor's dimensions."""

    offsets: Shape
    shape: Shape
    stored: Stored


@dataclass(frozen=True)
class StoredTensor:
    """A key's tensor."""

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Region:
    """What of which key is wanted.

    Attributes:
        stacked: its first dimension counts layers; the region is one layer's, `offsets` and `shape` without that dimension.
    """

    key: str
    offsets: Shape
    shape: Shape
    stacked: int | None = None


class TorchDistCheckpoint:
    """One directory; nothing but its index is read until a tensor is asked for.

    Attributes:
        tensors: key -> shape, dtype and chunks.
        objects: key -> where its pickle lies (random states, Transformer Engine's extra states).
    """

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, Stored]) -> None:
        self.path, self.tensors, self.objects = path, tensors, objects

    @cached_property
    def common(self) -> dict[str, Any]:
        """The common state. Raises ConfigError: damaged, or it would run code."""
        return dict(_unpickled(self.path / COMMON, self._load_common))

    def _load_common(self, path: Path) -> Any:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=safe_pickle)

    def region(self, key: str, offsets: Sequence[int], shape: Sequence[int]) -> Region | None:
        """Where to find a region of `key`: under that key, or in the one that stacks the layers. None: nowhere."""
        if key in self.tensors:
            return Region(key, tuple(offsets), tuple(shape))
        layer = layer_key(key)
        if layer is None or layer.stacked not in self.tensors:
            return None
        inside = layer.layer < self.tensors[layer.stacked].shape[0]
        return Region(layer.stacked, tuple(offsets), tuple(shape), layer.layer) if inside else None

    def shape_of(self, region: Region) -> Shape:
        """Of the whole tensor, of one layer where layers are stacked."""
        shape = self.tensors[region.key].shape
        return shape if region.stacked is None else shape[1:]

    def uncovered(self, key: str) -> str:
        """What is wrong with the chunks of a tensor; empty if they make it up, each element once.

        What no chunk holds would be read as whatever was in memory.
        """
        stored = self.tensors[key]
        if _tile(stored.chunks, stored.shape, 0):
            return ""
        return f"{self.path}: the parts of {key} do not make up a tensor of {list(stored.shape)}; copy the checkpoint again"

    def missing_bytes(self, stored: Stored) -> str:
        """What is wrong with the file in which something lies, as far as its size tells; empty if nothing is."""
        path = self.path / stored.file
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"{path} cannot be read ({error.strerror}); copy the checkpoint again"
        needed = stored.start + stored.length
        return f"{path} is cut off: it has {size} bytes of {needed}; copy the checkpoint again" if size < needed else ""

    @contextmanager
    def reading(self) -> Iterator[TensorReader]:
        """Open files stay open until the end."""
        reader = TensorReader(self)
        try:
            yield reader
        finally:
            reader.close()


@dataclass
class TensorReader:
    """Reads chunk by chunk: no more than one is in memory beside what it is copied to."""

    checkpoint: TorchDistCheckpoint
    _files: dict[str, Any] = field(default_factory=dict)

    def fill(self, target: torch.Tensor, region: Region) -> None:
        """Copy a region into `target`, of `region.shape`, in its dtype and on its device.

        What the checkpoint does not hold of it (rows by which a vocabulary was padded) stays as it is.

        Raises:
            ConfigError: a file is missing or damaged, or a chunk is not what the index says.
        """
        stored, layer = self.checkpoint.tensors[region.key], region.stacked
        offsets = region.offsets if layer is None else (layer, *region.offsets)
        shape = region.shape if layer is None else (1, *region.shape)
        place = target.detach().view(shape)
        for chunk in stored.chunks:
            overlap = _overlap(chunk, offsets, shape)
            if overlap is not None:
                mine, theirs = overlap
                place[mine].copy_(self._chunk(chunk, stored.dtype)[theirs])

    def read(self, region: Region) -> torch.Tensor:
        """A region as a new tensor, of the checkpoint's dtype."""
        target = torch.zeros(region.shape, dtype=self.checkpoint.tensors[region.key].dtype)
        self.fill(target, region)
        return target

    def object(self, key: str) -> Any:
        """A pickled object. Raises ConfigError: it would run code, or is damaged."""
        (value,) = self._load(self.checkpoint.objects[key], weights_only=False, pickle_module=safe_pickle)
        return value

    def bytes(self, stored: Stored) -> bytes:
        """As they lie in the file. Raises ConfigError: see `TorchDistCheckpoint.missing_bytes`."""
        return self._open(stored).read()

    def _chunk(self, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._load(chunk.stored, map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.shape or tensor.dtype != dtype:
            path = self.checkpoint.path / chunk.stored.file
            raise ConfigError(f"{path} holds something else at byte {chunk.stored.start} than its index says")
        return tensor

    def _load(self, stored: Stored, **how: Any) -> Any:
        return _unpickled(self.checkpoint.path / stored.file, lambda _: torch.load(self._open(stored), **how))

    def _open(self, stored: Stored) -> _Slice:
        problem = self.checkpoint.missing_bytes(stored)
        if problem:
            raise ConfigError(problem)
        if stored.file not in self._files:
            self._files[stored.file] = (self.checkpoint.path / stored.file).open("rb")
        return _Slice(self._files[stored.file], stored)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class _Slice(io.RawIOBase):
    """A part of a file as a file: torch reads a tensor straight into its memory, without the bytes beside it."""

    def __init__(self, file: Any, stored: Stored) -> None:
        super().__init__()
        self._file, self._stored, self._at = file, stored, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stored.length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._stored.length - self._at))
        self._file.seek(self._stored.start + self._at)
        count = self._file.readinto(memoryview(buffer).cast("B")[:count])
        self._at += count
        return count

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._stored.length - self._at)
        self._file.seek(self._stored.start + self._at)
        raw: bytes = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(raw)
        return raw


def open_checkpoint(path: str | Path) -> TorchDistCheckpoint:
    """Read the index.

    Raises:
        ConfigError: it is no checkpoint of this format, damaged, or names files outside its directory.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory; give one of Megatron's distributed checkpoints (iter_…)")
    kind = _format(path)
    if kind != BACKEND:
        raise ConfigError(f"{path} is of the format {kind!r}; read is {BACKEND} (--ckpt-format torch_dist)")
    return TorchDistCheckpoint(path, *_index(path))


def _format(path: Path) -> str:
    if not (path / FORMAT).is_file():
        hint = "; its newest step is named in latest_checkpointed_iteration.txt" if any(path.glob("iter_*")) else ""
        raise ConfigError(f"{path} is no distributed checkpoint: it has no {FORMAT}{hint}")
    try:
        return str(json.loads((path / FORMAT).read_text(encoding="utf-8"))["sharded_backend"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path / FORMAT} is damaged ({error}); copy the checkpoint again") from None


def _index(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Stored]]:
    def load(file: Path) -> Any:
        with file.open("rb") as opened:
            return safe_pickle.load(opened)

    index = _unpickled(path / METADATA, load)
    try:
        where = {(one.fqn, one.offset): _stored(path, info) for one, info in index.storage_data.items()}
        tensors, objects = {}, {}
        for key, entry in index.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                objects[key] = where[key, None]
                continue
            chunks = tuple(Chunk(tuple(c.offsets), tuple(c.sizes), where[key, c.offsets]) for c in entry.chunks)
            if not all(len(one.offsets) == len(one.shape) == len(entry.size) for one in chunks):
                raise ValueError(f"{key}: parts of other dimensions")
            if any(number < 0 for one in chunks for number in (*one.offsets, *one.shape)):
                raise ValueError(f"{key}: parts before its beginning")
            tensors[key] = StoredTensor(tuple(entry.size), _dtype(entry.properties.dtype), chunks)
        return tensors, objects
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path / METADATA} is damaged ({error!r}); copy the checkpoint again") from None


def _stored(path: Path, info: Any) -> Stored:
    name, descriptors = str(info.relative_path), getattr(info, "transform_descriptors", None)
    if Path(name).name != name or name in ("", ".", ".."):
        raise ConfigError(f"{path / METADATA} names a file outside its directory: {name}")
    if descriptors:
        raise ConfigError(f"{path} is compressed or encrypted ({', '.join(descriptors)}), which is not read")
    if min(info.offset, info.length) < 0:
        raise ValueError(f"a part of {name} begins or ends before it")
    return Stored(name, int(info.offset), int(info.length))


def _dtype(given: Any) -> torch.dtype:
    if not isinstance(given, torch.dtype):
        raise TypeError(f"{given!r} is no dtype")
    return given


def _unpickled(path: Path, load: Any) -> Any:
    """`load(path)`, with what can be wrong with a pickle said for people."""
    try:
        return load(path)
    except safe_pickle.Forbidden as error:
        raise ConfigError(
            f"{path} is refused: when opened {error}. Only data are read from a checkpoint, never code"
        ) from None
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no {path.name}; copy the checkpoint again") from None
    except ConfigError:
        raise
    except Exception as error:  # whatever a damaged pickle or archive makes of itself
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} is damaged ({first}); copy the checkpoint again") from None


def _tile(chunks: Sequence[Chunk], shape: Shape, dim: int) -> bool:
    """Do the chunks make up the dimensions from `dim` on, cut along one after the other?"""
    if dim == len(shape):
        return len(chunks) == 1
    slabs: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in chunks:
        slabs.setdefault((chunk.offsets[dim], chunk.shape[dim]), []).append(chunk)
    at = 0
    for start, size in sorted(slabs):
        if start != at or not _tile(slabs[start, size], shape, dim + 1):
            return False
        at += size
    return at == shape[dim]


def _overlap(
    chunk: Chunk, offsets: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Slices of a region and of a chunk that are the same elements; None if there are none."""
    mine, theirs = [], []
    for start, size, at, count in zip(offsets, shape, chunk.offsets, chunk.shape, strict=True):
        first, last = max(start, at), min(start + size, at + count)
        if first >= last:
            return None
        mine.append(slice(first - start, last - start))
        theirs.append(slice(first - at, last - at))
    return tuple(mine), tuple(theirs)
