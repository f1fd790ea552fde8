"""What kind of error a parameter has: the usual mistakes of parallel training leave recognisable traces.

    a gradient averaged over the wrong number of replicas, or summed twice     a factor
    slices put together, loaded or sent in another order                       a permutation of shards
    a weight that the optimizer does not hold, or whose copy is overwritten    it stands still

numpy only: each function takes whole tensors and knows no run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldt_schedules.training.verification.joining import Partition, cut, join

EXPLAINED = 0.1
"""An explanation holds when it leaves at most this share of the error."""

_NEAR = 0.01  # of a factor


@dataclass(frozen=True)
class Cause:
    """What is wrong, as it is said of one parameter and of several."""

    one: str
    many: str


DIFFERS = Cause("differs", "differ")


def norm(tensor: np.ndarray) -> float:
    """L2 norm, in float64."""
    return float(np.linalg.norm(tensor.astype(np.float64, copy=False).ravel()))


def relative_error(mine: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference, in float64; 0/0 is 0, x/0 and what is not finite is inf."""
    assert mine.shape == reference.shape, f"{mine.shape} against {reference.shape}"
    wide = reference.astype(np.float64)
    difference = norm(mine.astype(np.float64) - wide)
    if difference == 0:
        return 0.0
    size = norm(wide)
    if size == 0 or not np.isfinite(difference) or not np.isfinite(size):
        return float("inf")
    return difference / size


def diagnose(mine: np.ndarray, reference: np.ndarray, partition: Partition | None = None, shards: int = 1) -> Cause:
    """The simplest explanation of a tensor that is not as the reference.

    Args:
        partition, shards: how it is cut over how many tensor-parallel processes.
    """
    if not np.isfinite(mine).all():
        return Cause("is not finite", "are not finite")
    if not mine.any():
        return Cause("is zero", "are zero")
    factor = _factor(mine, reference)
    if factor is not None:
        times = f"{_told(factor)} times"
        return Cause(f"is {times} the reference", f"are {times} the reference")
    order = _order(mine, reference, partition, shards)
    if order is not None:
        what = f"tensor-parallel shards in the order {' '.join(map(str, order))}"
        return Cause(f"has its {what}", f"have their {what}")
    return DIFFERS


def stood_still(
    mine: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray], step: int
) -> Cause | None:
    """Of a weight before and after step `step`: is it the same to the last bit, although the reference has moved?"""
    if np.array_equal(*mine) and not np.array_equal(*reference):
        return Cause(f"was not updated in step {step}", f"were not updated in step {step}")
    return None


def _factor(mine: np.ndarray, reference: np.ndarray) -> float | None:
    """The number that the reference is multiplied by, if that explains the error."""
    ours, theirs = mine.astype(np.float64), reference.astype(np.float64)
    square = float(np.vdot(theirs, theirs))
    if square == 0:
        return None
    factor = float(np.vdot(theirs, ours)) / square
    return factor if norm(ours - factor * theirs) <= EXPLAINED * norm(ours - theirs) else None


def _told(factor: float) -> str:
    """In the digits that mean something; parameters with one cause are told with one factor.

    A mistake multiplies or divides by a whole number, and rounding in 16 bits moves that by a little. Close to 1 no whole
    number is near, and all digits of a float32 are told.
    """
    if abs(factor - 1) < _NEAR:
        return f"{factor:.8g}"
    simple = [float(round(factor))]
    if 1e-6 < abs(factor) < 1:
        simple.append(1 / round(1 / factor))
    near = (number for number in simple if abs(factor - number) <= _NEAR * abs(number))
    return f"{next(near, factor):.3g}"


def _order(mine: np.ndarray, reference: np.ndarray, partition: Partition | None, shards: int) -> tuple[int, ...] | None:
    """Which shard of the reference stands at each place, if a permutation explains the error."""
    if partition is None or shards == 1:
        return None
    ours, theirs = cut(mine, partition, shards), cut(reference, partition, shards)
    # Each place takes the shard it is nearest to: shards squared comparisons, where all orders would be a factorial.
    order = tuple(min(range(shards), key=lambda other: norm(one - theirs[other])) for one in ours)
    if len(set(order)) < shards or order == tuple(range(shards)):
        return None
    permuted = join([theirs[place] for place in order], partition)
    return order if norm(mine - permuted) <= EXPLAINED * norm(mine - reference) else None
