"""Batches are read once on the edge, by the first of its chunks to run, and seen again by the others.

The user's forward step draws from a data iterator as it always does. The first draws for a microbatch, of a head or of one
of several roots, are recorded; when another root, a middle chunk of the edge (a model that goes round twice has one) or the
tail runs the same microbatch it is given the same objects, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ldt_schedules.errors import LdtError


class SharedBatches:
    """Deals each microbatch's draws to all chunks of the edge, to the tail at last.

    `source` may be None (a rank that is fed by broadcast inside its tensor-parallel group draws nothing).
    """

    def __init__(self, source: Iterator[Any] | None) -> None:
        self._source = source
        self._drawn: dict[int, list[Any]] = {}

    def draw(self, num_microbatches: int) -> list[Any]:
        """Read one batch for each microbatch now, in their order; the chunks will be given these.

        For models that must say something of all microbatches before the first is run. Raises what the source raises, and
        LdtError when it ends too early.
        """
        assert self._source is not None and not self._drawn, "batches are drawn once, where there is a source"
        for microbatch in range(num_microbatches):
            try:
                self._drawn[microbatch] = [next(self._source)]
            except StopIteration:
                raise LdtError(
                    f"the data iterator ended at microbatch {microbatch} of {num_microbatches}; a step needs one batch for "
                    "each"
                ) from None
        return [batch for (batch,) in self._drawn.values()]

    def for_chunk(self, microbatch: int) -> Iterator[Any] | None:
        """For a chunk before the tail: the first to come reads the source, the others see what it has read.

        Raises:
            LdtError: from `next`, when a later chunk draws more often than the first did.
        """
        if self._source is None:
            return None
        if microbatch in self._drawn:
            return _replay(self._drawn[microbatch], microbatch)
        return _Recording(self._source, self._drawn.setdefault(microbatch, []))

    def for_tail(self, microbatch: int) -> Iterator[Any] | None:
        """The same draws once more; afterwards they are gone. Raises as `for_chunk` does."""
        if self._source is None:
            return None
        return _replay(self._drawn.pop(microbatch, []), microbatch)

    def assert_empty(self) -> None:
        """Raises AssertionError when a batch was read and never seen by the tail."""
        assert not self._drawn, f"batches of microbatches {sorted(self._drawn)} were read and not used by the tail"


class _Recording:
    """Asks the source for nothing but `next`: a trainer's iterator may have no more."""

    def __init__(self, source: Iterator[Any], drawn: list[Any]) -> None:
        self._source, self._drawn = source, drawn

    def __iter__(self) -> _Recording:
        return self

    def __next__(self) -> Any:
        item = next(self._source)
        self._drawn.append(item)
        return item


def _replay(drawn: list[Any], microbatch: int) -> Iterator[Any]:
    yield from drawn
    raise LdtError(
        f"the forward step of a later chunk read more batches than the first one's for microbatch {microbatch} "
        f"({len(drawn)}); a forward step must read the same number on every chunk"
    )
