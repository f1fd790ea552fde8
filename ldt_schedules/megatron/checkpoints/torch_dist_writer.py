"""Writes megatron-core's distributed checkpoints (`torch_dist`, see torch_dist.py), one tensor after the other.

Each process writes a file of its own and hands its entries to the one that writes the index. megatron-core's writer starts a
manager process on each rank and, in 0.12, does not know the arguments of later torch versions; what it writes is as simple as
this. Digests are taken of what is written, as it is written.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.torch_dist import BACKEND, COMMON, FORMAT, METADATA, Chunk, Shape, Stored


@dataclass(frozen=True)
class Entry:
    """One tensor's chunk, or an object (`shape` and `dtype` None)."""

    key: str
    chunk: Chunk
    shape: Shape | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class WrittenFile:
    """What a process wrote."""

    name: str
    num_bytes: int
    sha256: str
    entries: tuple[Entry, ...]


def file_name(rank: int) -> str:
    """The name that megatron-core gives the file of a rank."""
    return f"__{rank}_0.distcp"


class ChunkWriter:
    """Writes one file of chunks; use as a context manager. `written` describes it afterwards.

    Raises:
        ConfigError: the file cannot be written (no space left).
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._path, self._entries = directory / name, list[Entry]()
        self.written: WrittenFile | None = None

    def __enter__(self) -> ChunkWriter:
        with disk_errors(self._path):
            self._out = _Hashing(self._path.open("wb"))
        return self

    def put(self, key: str, tensor: torch.Tensor, offsets: Sequence[int] = (), shape: Sequence[int] = ()) -> None:
        """Append a chunk of `key`'s tensor.

        Args:
            tensor: with all dimensions of the whole one.
            offsets: of the chunk in the whole tensor; default its beginning.
            shape: of the whole tensor; default: the chunk is all of it.
        """
        offsets = tuple(offsets) or (0,) * tensor.dim()
        chunk = Chunk(tuple(offsets), tuple(tensor.shape), self._save(_alone(tensor)))
        self._entries.append(Entry(key, chunk, tuple(shape) or tuple(tensor.shape), tensor.dtype))

    def put_object(self, key: str, value: Any) -> None:
        """Append an object of plain types and tensors."""
        self._entries.append(Entry(key, Chunk((), (), self._save(value))))

    def _save(self, value: Any) -> Stored:
        start = self._out.count
        with disk_errors(self._path):
            torch.save(value, self._out)
        return Stored(self._path.name, start, self._out.count - start)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with disk_errors(self._path):
            self._out.close()
        digest = self._out.digest.hexdigest()
        self.written = WrittenFile(self._path.name, self._out.count, digest, tuple(self._entries))


def write_index(directory: Path, written: Iterable[WrittenFile]) -> None:
    """`.metadata`, from what all processes wrote, and the format's name. Raises ConfigError: no space left."""
    tensors: dict[str, TensorStorageMetadata] = {}
    index = Metadata(state_dict_metadata={}, storage_data={})
    for one in (entry for file in written for entry in file.entries):
        info = _StorageInfo(one.chunk.stored.file, one.chunk.stored.start, one.chunk.stored.length)
        if one.shape is None or one.dtype is None:
            index.state_dict_metadata[one.key] = BytesStorageMetadata()
            index.storage_data[MetadataIndex(one.key)] = info
            continue
        if one.key not in tensors:
            tensors[one.key] = TensorStorageMetadata(TensorProperties(dtype=one.dtype), torch.Size(one.shape), [])
        offsets = torch.Size(one.chunk.offsets)
        tensors[one.key].chunks.append(ChunkStorageMetadata(offsets, torch.Size(one.chunk.shape)))
        index.storage_data[MetadataIndex(one.key, offsets)] = info
    index.state_dict_metadata.update(tensors)
    write_file(directory / METADATA, pickle.dumps(index))
    content = {"sharded_backend": BACKEND, "sharded_backend_version": 1, "common_backend": "torch"}
    write_file(directory / FORMAT, json.dumps({**content, "common_backend_version": 1}).encode())


def write_common(directory: Path, common: dict[str, Any]) -> None:
    """`common.pt`. Raises ConfigError: no space left."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    write_file(directory / COMMON, buffer.getvalue())


def write_file(path: Path, content: bytes) -> None:
    """All of it, on the disk when this returns. Raises ConfigError: it cannot be written."""
    with disk_errors(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, and without the rest of the storage of which it is a view: torch.save would write that, too."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


@dataclass
class _Hashing(io.RawIOBase):
    """A file that counts and digests what goes into it."""

    file: Any
    count: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.file.write(view)
        self.digest.update(view)
        self.count += len(view)
        return len(view)

    def close(self) -> None:
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        super().close()


class disk_errors:
    """Inside, what the file system refuses becomes an error for people."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # torch.save's archive writer says that a write of the file failed by a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else getattr(error, "__context__", None)
        if isinstance(cause, OSError):
            raise ConfigError(f"{self._path} cannot be written: {cause.strerror or cause}") from None
