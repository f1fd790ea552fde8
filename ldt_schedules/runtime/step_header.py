"""What the edge tells the cloud before a step: the little that the middle layers need, and nothing of the data.

Disclosed: the step's number, whether it trains or evaluates, which table is run, a hash of what was agreed on at start, and
for each microbatch the shape and dtype of its activations (hence sequence length and microbatch size), and what a model's
`MicrobatchFormat` says that its middle layers need. Never sent: tokens, labels, pixels, logits.

The header comes from another machine, so that every field is checked before anybody makes room for a tensor of its shape.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.planning.layout import MAX_MICROBATCHES
from ldt_schedules.runtime.microbatch_format import Told

MAX_DIMS = 8
MAX_ELEMENTS = 2**40
"""Of one activation: a terabyte or more, which nobody sends."""
_MAX_NAME, _MAX_TEXT = 200, 10_000

_Number = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_YesOrNo = Annotated[bool, Field(strict=True)]
_Name = Annotated[str, Field(max_length=_MAX_NAME)]
_Size = Annotated[int, Field(strict=True, ge=1, le=MAX_ELEMENTS)]
_Shape = Annotated[tuple[_Size, ...], Field(min_length=1, max_length=MAX_DIMS)]


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
        agreed: hash of what both sites agreed on at start (versions, config, ranks).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: _Number
    forward_only: _YesOrNo
    table_hash: _Name
    shapes: Annotated[tuple[_Shape, ...], Field(min_length=1, max_length=MAX_MICROBATCHES)]
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    told: tuple[Told, ...] | None = None
    failure: Annotated[str, Field(min_length=1, max_length=_MAX_TEXT)] | None = None
    mistake: _YesOrNo = False
    agreed: _Name = ""

    def to_message(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> StepHeader:
        """From what `to_message` gave, be it that itself or what JSON made of it.

        Raises:
            LdtError: naming each field that is missing, unknown, of another type or beyond its limits.
        """
        try:
            header = _READER.validate_python(message)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, one['loc'])) or 'all of it'}: {one['msg']}" for one in error.errors()]
            raise _no_header(wrong) from None
        wrong = [f"{field.name}: is missing" for field in fields(cls) if field.name not in message]
        wrong += [f"shapes.{m}: too large" for m, s in enumerate(header.shapes) if math.prod(s) > MAX_ELEMENTS]
        if header.told is not None and len(header.told) != header.num_microbatches:
            wrong.append(f"told: is of {len(header.told)} microbatches, shapes of {header.num_microbatches}")
        if wrong:
            raise _no_header(wrong)
        return header

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


_READER = TypeAdapter(StepHeader)
_NAMED_AT_ONCE = 5


def _no_header(wrong: list[str]) -> LdtError:
    more = f"\n  and {len(wrong) - _NAMED_AT_ONCE} more" if len(wrong) > _NAMED_AT_ONCE else ""
    return LdtError(
        "what came as the header of a step is none; are both sites of one version, and is nobody else on the link?\n  "
        + "\n  ".join(one[:_MAX_NAME] for one in wrong[:_NAMED_AT_ONCE])
        + more
    )
