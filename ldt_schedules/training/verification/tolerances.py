"""How far two correct runs may be apart.

They compute the same sums, but not all in the same order: tensor parallelism adds partial products of its processes,
data parallelism adds gradients of its replicas. Each order rounds differently, by the unit of the precision:

    precision   unit      what is allowed
    fp64        1.1e-16   1e-12: ten thousand units. A mistake is larger, whatever it is; so fp64 tells rounding from bugs
    fp32        6.0e-8    5e-6 of a gradient's norm: eighty units, for sums over some thousand terms in a few layers
    fp16        4.9e-4    every layer's output is rounded anew, forwards and backwards, and a loss of some nats with it;
    bf16        3.9e-3    about ten units. A factor of 2 or a swapped shard is still ten times larger

The gradient's norm is a float32 in every precision: megatron-core makes it one.

A weight moves by far less than it is, so its error is smaller than its gradient's; but a half-precision weight is itself
rounded, and may be rounded the other way.

**Adam** divides a gradient by its own size, so of an element whose gradient is nothing but rounding it makes a full step,
in any direction. (The bias of the keys is all such: attention does not depend on it.) So with Adam the weights of elements
whose gradient was in some step below `small_gradient` of its parameter's root mean square, on both runs, are left out.
Their gradients are compared like all others, and the report says how many they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from ldt_schedules.errors import ConfigError


@dataclass(frozen=True)
class Tolerances:
    """The largest errors that pass.

    Attributes:
        loss: of a microbatch, absolute, nats a token.
        gradients: of each parameter, norm of the difference over the reference's norm.
        grad_norm: relative.
        weights: of each parameter, as gradients.
        small_gradient: see above; a share, and nothing that must pass.
    """

    loss: float
    gradients: float
    grad_norm: float
    weights: float
    small_gradient: float


TOLERANCES = {
    "fp64": Tolerances(loss=1e-12, gradients=1e-12, grad_norm=1e-6, weights=1e-12, small_gradient=1e-9),
    "fp32": Tolerances(loss=1e-5, gradients=5e-6, grad_norm=5e-6, weights=1e-6, small_gradient=1e-3),
    "fp16": Tolerances(loss=5e-3, gradients=5e-3, grad_norm=5e-3, weights=5e-4, small_gradient=1e-2),
    "bf16": Tolerances(loss=4e-2, gradients=4e-2, grad_norm=4e-2, weights=2e-3, small_gradient=1e-2),
}


def with_overrides(tolerances: Tolerances, overrides: Iterable[str]) -> Tolerances:
    """A copy with each `kind=number` set.

    Raises:
        ConfigError: no such kind, or a value that is no number of 0 or more.
    """
    kinds = [field.name for field in fields(Tolerances)]
    for override in overrides:
        kind, _, text = override.partition("=")
        if kind not in kinds:
            raise ConfigError(f"--tolerance {override!r}: give one of {', '.join(kinds)}, for instance gradients=1e-4")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not value >= 0:
            raise ConfigError(f"--tolerance {override!r}: the value must be a number of 0 or more, such as 1e-4")
        tolerances = replace(tolerances, **{kind: value})
    return tolerances
