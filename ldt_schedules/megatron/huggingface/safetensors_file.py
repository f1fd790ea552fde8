"""Writes a safetensors file tensor by tensor.

`safetensors.save_file` wants all tensors of a file at once: a second copy of everything that a process holds. Names, shapes
and dtypes are known beforehand, so here the header is written first and each tensor where it belongs when it comes.

The format (https://huggingface.co/docs/safetensors, "Format"): the header's length in 8 bytes, little-endian; the header,
JSON, padded with spaces to a multiple of 8; the tensors' bytes, without gaps. Wide dtypes go first, so all are aligned.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of weights: a safetensors dtype and torch's."""


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of a tensor before it is read.

    Attributes:
        dtype: in the spelling of safetensors (`BF16`).
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorWriter:
    """Puts tensors into an open file; from `write_safetensors`."""

    def __init__(self, file: BinaryIO, infos: Mapping[str, TensorInfo]) -> None:
        order = sorted(infos, key=lambda name: (-DTYPES[infos[name].dtype].itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._file, self._infos, self._starts = file, infos, dict[str, int]()
        at = 0
        for name in order:
            end = at + infos[name].num_bytes
            header[name] = {"dtype": infos[name].dtype, "shape": infos[name].shape, "data_offsets": [at, end]}
            self._starts[name], at = at, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._data_start = 8 + len(text)
        file.truncate(self._data_start + at)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; each is put once."""
        info = self._infos[name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, DTYPES[info.dtype]), (
            f"{name} is not what was announced"
        )
        self._file.seek(self._data_start + self._starts.pop(name))
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def check_complete(self) -> None:
        assert not self._starts, f"never written: {sorted(self._starts)}"


@contextmanager
def write_safetensors(path: Path, infos: Mapping[str, TensorInfo]) -> Iterator[TensorWriter]:
    """A writer of `path`. The file appears under its name when all tensors are in it, never a part of it."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            writer = TensorWriter(file, infos)
            yield writer
            writer.check_complete()
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
