"""Several microbatches through a module in one pass: put together on the way in, taken apart on the way out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from ldt_schedules.errors import LdtError


class Packing(Protocol):
    """How the microbatches of one stage are packed.

    The inputs of one microbatch are what the module would be called with: of a root whatever the user gave, of another stage
    a tuple with what each feeding stage handed over.
    """

    def pack(self, inputs: list[Any]) -> Any:
        """The inputs of one call, from those of each microbatch."""

    def split(self, output: Any, inputs: list[Any]) -> list[Any]:
        """The output of each microbatch, from that of the call; differentiable."""


class Rows:
    """Concatenates every tensor along its first dimension and splits the output along the same.

    Args:
        count: inputs of one microbatch -> how many rows of the output are its own. Without it the output must have as many
            rows as the first tensor of the inputs.
    """

    def __init__(self, count: Callable[[Any], int] | None = None) -> None:
        self._count = count

    def pack(self, inputs: list[Any]) -> Any:
        """Raises LdtError where there is nothing that can be concatenated."""
        return concatenated(inputs)

    def split(self, output: Any, inputs: list[Any]) -> list[Any]:
        """Raises LdtError where the rows do not add up: they are never guessed."""
        counts = [self._rows(one) for one in inputs]
        if output is None:
            return [None] * len(inputs)
        if isinstance(output, torch.Tensor):
            return self._parts(output, counts)
        by_part = [[None] * len(inputs) if part is None else self._parts(part, counts) for part in output]
        return list(zip(*by_part, strict=True))

    def _rows(self, inputs: Any) -> int:
        if self._count is not None:
            return self._count(inputs)
        first = next((tensor for tensor in _tensors(inputs)), None)
        if first is None:
            raise LdtError("a packed microbatch without a tensor: say with Rows(count) how many rows are its own")
        return first.shape[0]

    def _parts(self, output: torch.Tensor, counts: list[int]) -> list[Any]:
        rows = output.shape[0] if output.dim() else None
        if rows != sum(counts):
            raise LdtError(
                f"the output of packed microbatches has {rows} rows and the microbatches have {counts}: say with "
                "PipelineStage(module, packing=Rows(count)) how many rows are each one's own"
            )
        return list(output.split(counts))


def concatenated(items: list[Any]) -> Any:
    """Tensors along dimension 0, mappings and tuples part by part; what is absent (None) is left out.

    Raises:
        LdtError: the items are of different kinds, or other than tensors and unequal.
    """
    present = [item for item in items if item is not None]
    if not present:
        return None
    first = present[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(present)
    if isinstance(first, Mapping):
        return {key: concatenated([item[key] for item in present]) for key in first}
    if isinstance(first, (tuple, list)):
        return tuple(concatenated(list(parts)) for parts in zip(*present, strict=True))
    if any(item != first for item in present):
        raise LdtError(f"cannot pack {first!r} with {next(item for item in present if item != first)!r}")
    return first


def _tensors(inputs: Any) -> list[torch.Tensor]:
    if isinstance(inputs, torch.Tensor):
        return [inputs]
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
