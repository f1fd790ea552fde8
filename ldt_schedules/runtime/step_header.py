"""What the edge tells the cloud before a step: the little that the middle layers need, and nothing of the data.

Disclosed: the step's number, whether it trains or evaluates, which table is run, and for each microbatch the shape and
dtype of its activations (hence sequence length and microbatch size), and what a model's `MicrobatchFormat` says that its
middle layers need. Never sent: tokens, labels, pixels, logits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.runtime.microbatch_format import Told


@dataclass(frozen=True)
class StepHeader:
    """One step.

    Attributes:
        step: counts the calls of the forward-backward function since the start, on both sites.
        forward_only: evaluation.
        table_hash: of the schedule table.
        shapes: `[s, b, h]` of each microbatch's activations, the whole sequence (not a rank's part of it); of a model with
            a `MicrobatchFormat` what the training loop says, the format's own shapes go before it.
        dtype: of the activations, as torch names it (`"float32"`).
        told: for each microbatch what its format tells the cloud; None without a format, and on a site that has not been
            told yet.
        failure: why there will be no such step; the other fields then mean nothing. `mistake`: it is the user's.
    """

    step: int
    forward_only: bool
    table_hash: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    told: tuple[Told, ...] | None = None
    failure: str | None = None
    mistake: bool = False

    def to_message(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> StepHeader:
        told = message["told"]
        return cls(
            **{
                **message,
                "shapes": tuple(tuple(shape) for shape in message["shapes"]),
                "told": None if told is None else tuple(told),
            }
        )

    @property
    def num_microbatches(self) -> int:
        return len(self.shapes)

    def spec(self, microbatch: int) -> TensorSpec:
        """Shape and dtype of one microbatch's activation, whole."""
        return TensorSpec(self.shapes[microbatch], getattr(torch, self.dtype))

    def require_agreement(self, mine: StepHeader) -> None:
        """Compare the header that came with the one this site would have written.

        What only the edge can know (`told`) is not compared.

        Raises:
            LdtError: the edge says that there is no step (ConfigError where that is a user's mistake); or naming every field
                that differs, with both values.
        """
        if self.failure is not None:
            raise ConfigError(self.failure) if self.mistake else LdtError(self.failure)
        ours = replace(mine, told=self.told)
        differing = [
            f"{name}: edge {theirs!r}, here {here!r}"
            for (name, theirs), here in zip(asdict(self).items(), asdict(ours).values(), strict=True)
            if theirs != here
        ]
        if differing:
            raise LdtError("the two sites are about to run different steps:\n  " + "\n  ".join(differing))
