"""What the edge tells the cloud before a step: the little that the middle layers need, and nothing of the data.

Disclosed: the step's number, whether it trains or evaluates, which table is run, and for each microbatch the shape and
dtype of its activations (hence sequence length and microbatch size). Never sent: tokens, labels, masks, logits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.errors import LdtError


@dataclass(frozen=True)
class StepHeader:
    """One step.

    Attributes:
        step: counts the calls of the forward-backward function since the start, on both sites.
        forward_only: evaluation.
        table_hash: of the schedule table.
        shapes: `[s, b, h]` of each microbatch's activations, the whole sequence (not a rank's part of it).
        dtype: of the activations, as torch names it (`"float32"`).
    """

    step: int
    forward_only: bool
    table_hash: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str

    def to_message(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> StepHeader:
        return cls(**{**message, "shapes": tuple(tuple(shape) for shape in message["shapes"])})

    @property
    def num_microbatches(self) -> int:
        return len(self.shapes)

    def spec(self, microbatch: int) -> TensorSpec:
        """Shape and dtype of one microbatch's activation, whole."""
        return TensorSpec(self.shapes[microbatch], getattr(torch, self.dtype))

    def require_agreement(self, mine: StepHeader) -> None:
        """Compare the header that came with the one this site would have written.

        Raises:
            LdtError: naming every field that differs, with both values.
        """
        differing = [
            f"{name}: edge {theirs!r}, here {ours!r}"
            for (name, theirs), ours in zip(asdict(self).items(), asdict(mine).values(), strict=True)
            if theirs != ours
        ]
        if differing:
            raise LdtError("the two sites are about to run different steps:\n  " + "\n  ".join(differing))
