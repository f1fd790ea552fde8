"""The vocabulary of an architecture's table, and what follows from one: shapes, slices, both directions.

An entry pairs one parameter of Megatron's whole model with the Hugging Face tensors of which it is made. `Architecture.pairs`
writes the entries out for every layer, in the spelling of one directory; a `Pair` then knows which rows of which tensors a
tensor-parallel process holds (`part`), fills a parameter with them (`Part.fill`), and makes the tensors again (`unpack`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch

from ldt_schedules.errors import LdtError
from ldt_schedules.megatron.huggingface.packing import Packing, Plain, RowRange
from ldt_schedules.megatron.huggingface.sizes import Sizes

Shape = tuple[int, ...]

Read = Callable[[str, slice, slice], torch.Tensor]
"""`(name, rows, columns) -> [rows, columns]`, or `[rows]` of a vector."""


@dataclass(frozen=True)
class TensorPattern:
    """A Hugging Face tensor of one layer or of the whole model.

    Attributes:
        name: as published checkpoints spell it; `{n}` is the layer.
        shape: names of sizes (`sizes.py`).
    """

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        megatron: the parameter in Megatron's whole model; `{n}` is the layer.
        tensors: what it is made of, in the order in which the packing counts them.
        tied_to: the parameter that takes its place where embeddings are tied; then its tensors need not exist.
    """

    megatron: str
    tensors: tuple[TensorPattern, ...]
    packing: Packing = field(default_factory=Plain)
    tied_to: str | None = None


def entry(
    megatron: str, *tensors: tuple[str, ...], packing: Packing | None = None, tied_to: str | None = None
) -> Entry:
    """An Entry; each tensor is `(name, size, size, ...)`."""
    patterns = tuple(TensorPattern(name, tuple(shape)) for name, *shape in tensors)
    return Entry(megatron, patterns, packing or Plain(), tied_to)


@dataclass(frozen=True)
class Part:
    """What a tensor-parallel process holds of a parameter.

    Attributes:
        names: of the Hugging Face tensors.
        rows: in the order in which they lie in the parameter.
        columns: the same of every row.
    """

    names: tuple[str, ...]
    rows: tuple[RowRange, ...]
    columns: slice

    def fill(self, target: torch.Tensor, read: Read) -> None:
        """Write into `target`, in its dtype and on its device, reading one range of rows after the other."""
        at = 0
        for one in self.rows:
            place = target[at : at + len(one)]
            if one.source is None:
                place.zero_()
            else:
                read_rows = read(self.names[one.source], slice(one.start, one.stop), self.columns)
                place.copy_(read_rows.reshape(place.shape))
            at += len(one)


@dataclass(frozen=True)
class Pair:
    """An entry of one layer.

    Attributes:
        names: Hugging Face names, in the directory's spelling.
        shapes: of those tensors.
        tied_to: the parameter whose weight this one uses: filled from its tensors, never saved.
        copies: names under which a directory may hold the first tensor a second time (tied embeddings).
    """

    megatron: str
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    packing: Packing
    sizes: Sizes
    tied_to: str | None = None
    copies: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        """Of Megatron's whole tensor: `[rows]` or `[rows, columns]`."""
        rows = sum(map(len, self._rows(0, 1)))
        return (rows,) if len(self.shapes[0]) == 1 else (rows, math.prod(self.shapes[0][1:]))

    def _rows(self, rank: int, size: int) -> tuple[RowRange, ...]:
        return tuple(self.packing.rows([shape[0] for shape in self.shapes], self.sizes, rank, size))

    def cut_dim(self, shape: Sequence[int], size: int) -> int | None:
        """Along which dim a parameter of this shape is cut over `size` processes; None: each holds the whole.

        Megatron's own marks of a parameter differ between versions (the stride of gate and up) and are missing on norms;
        its shape is always right.

        Raises:
            LdtError: it is neither the whole tensor nor an equal part of it.
        """
        if tuple(shape) == self.shape:
            return None
        for dim, whole in enumerate(self.shape):
            if whole % size == 0 and tuple(shape) == (*self.shape[:dim], whole // size, *self.shape[dim + 1 :]):
                return dim
        raise LdtError(
            f"{self.megatron} is {list(shape)} on each of {size} tensor-parallel processes, the whole is {list(self.shape)}"
        )

    def part(self, shape: Sequence[int], rank: int, size: int) -> Part:
        """What process `rank` of `size` holds, where its parameter has this shape.

        Raises:
            LdtError: as `cut_dim`.
        """
        dim = self.cut_dim(shape, size)
        rows = self._rows(rank, size) if dim == 0 else self._rows(0, 1)
        columns = slice(rank * shape[1], (rank + 1) * shape[1]) if dim == 1 else slice(None)
        return Part(self.names, rows, columns)

    def unpack(self, parts: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
        """The Hugging Face tensors, from the parameters of all tensor-parallel processes; one where none is cut."""
        flat = [(shape[0],) if len(shape) == 1 else (shape[0], math.prod(shape[1:])) for shape in self.shapes]
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(flat, dtypes, strict=True)]
        for rank, values in enumerate(parts):
            part, at = self.part(values.shape, rank, len(parts)), 0
            for one in part.rows:
                if one.source is not None:
                    rows = tensors[one.source][one.start : one.stop]
                    (rows if rows.dim() == 1 else rows[:, part.columns]).copy_(values[at : at + len(one)])
                at += len(one)
        return [tensor.reshape(shape) for tensor, shape in zip(tensors, self.shapes, strict=True)]


@dataclass(frozen=True)
class Spelling:
    """How a generation of checkpoints begins the names: `(published, spelled)`, the first that fits counts."""

    prefixes: tuple[tuple[str, str], ...] = ()

    def __call__(self, name: str) -> str:
        for published, spelled in self.prefixes:
            if name.startswith(published):
                return spelled + name.removeprefix(published)
        return name


@dataclass(frozen=True)
class Architecture:
    """A model that transformers knows, and its table.

    Attributes:
        name: as `architectures` in config.json has it.
        once: entries without a layer.
        layers: the size that counts them (`num_layers`, `vision.num_layers`) -> the entries of a layer.
        spellings: the published one first.
        settings: config.json -> `{"vocab_size": ..., "model": {...}, "vision": {...}}`, in our config keys; no `vision` of a
            model of text.
    """

    name: str
    once: tuple[Entry, ...]
    layers: Mapping[str, tuple[Entry, ...]]
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    spellings: tuple[Spelling, ...] = (Spelling(),)

    def pairs(self, sizes: Sizes, names: Collection[str] = ()) -> dict[str, Pair]:
        """Every parameter of the whole model, by Megatron's name.

        Args:
            names: of the tensors in a directory: the spelling is the one that fits most of them.
        """
        return max((self._spelled(sizes, one) for one in self.spellings), key=lambda pairs: _known(pairs, names))

    def _spelled(self, sizes: Sizes, spelling: Spelling) -> dict[str, Pair]:
        written: list[tuple[Entry, int | None]] = [(one, None) for one in self.once]
        for count, entries in self.layers.items():
            written += [(one, n) for n in range(attrgetter(count)(sizes)) for one in entries]
        pairs = {}
        for one, n in written:
            pair = _pair(one, n, sizes, spelling)
            pairs[pair.megatron] = pair
        if sizes.tied:
            for one in self.once:
                if one.tied_to is not None:
                    weight, copy = pairs[one.tied_to], pairs[one.megatron]
                    pairs[one.tied_to] = replace(weight, copies=weight.copies + copy.names)
                    pairs[one.megatron] = replace(weight, megatron=one.megatron, tied_to=one.tied_to)
        return pairs


def _pair(one: Entry, n: int | None, sizes: Sizes, spelling: Spelling) -> Pair:
    return Pair(
        megatron=one.megatron.format(n=n),
        names=tuple(spelling(tensor.name.format(n=n)) for tensor in one.tensors),
        shapes=tuple(tuple(attrgetter(size)(sizes) for size in tensor.shape) for tensor in one.tensors),
        packing=one.packing,
        sizes=sizes,
    )


def _known(pairs: Mapping[str, Pair], names: Collection[str]) -> int:
    return sum(name in names for pair in pairs.values() for name in pair.names)
