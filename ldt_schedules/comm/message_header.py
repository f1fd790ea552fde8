"""What stands in front of every message that describes itself: which one it is, and the shape and dtype of its parts.

A receiver reads it before it makes room for the payload. So a message that is not the expected one is an error with both
sides' words in it; over bare gloo a payload of another size ends the process (`op.preamble.length <= op.nbytes`).

    [iteration, tag, form, parts,  dtype, dims, size 0 .. size 7,  dtype, dims, ... , mark]      int64, always of one length
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ldt_schedules.comm.message_mark import put_mark
from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.errors import LdtError

MAX_PARTS = 16
MAX_DIMS = 8
MAX_PART_BYTES = 2**43
"""Of one tensor: more than any machine holds."""
_PART = 2 + MAX_DIMS
_FIXED = 4
_LENGTH = _FIXED + MAX_PARTS * _PART

_ABSENT, _TENSOR, _TUPLE = range(3)
_NO_PART = -1
_DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip

Specs = tuple["TensorSpec | None", ...]


@dataclass(frozen=True)
class MessageHeader:
    """One message.

    Attributes:
        iteration: counts the steps of the run.
        tag: which message of the step, as sender and receiver number it.
        parts: of each tensor; None for a part that is not there. An absent message has none.
        form: absent (None), one tensor, or a tuple of them.
    """

    iteration: int
    tag: int
    parts: Specs
    form: int

    @classmethod
    def of(cls, content: Any, iteration: int, tag: int) -> MessageHeader:
        """The header of `content`: None, a tensor, or a tuple of tensors and None.

        Raises:
            LdtError: it is something else, or has too many parts or dimensions.
        """
        if content is None:
            return cls(iteration, tag, (), _ABSENT)
        form = _TENSOR if isinstance(content, torch.Tensor) else _TUPLE
        return cls(iteration, tag, specs_of(content), form)

    def encoded(self) -> torch.Tensor:
        """As bytes, `[n]` uint8 on the CPU, the mark at their end."""
        numbers = [self.iteration, self.tag, self.form, len(self.parts)]
        for part in self.parts:
            if part is None:
                numbers += [_NO_PART, 0, *[0] * MAX_DIMS]
            else:
                padding = [0] * (MAX_DIMS - len(part.shape))
                numbers += [_DTYPES.index(part.dtype), len(part.shape), *part.shape, *padding]
        message = torch.tensor(numbers + [0] * (_LENGTH + 1 - len(numbers)), dtype=torch.int64).view(torch.uint8)
        put_mark(message)
        return message

    @classmethod
    def decoded(cls, message: torch.Tensor) -> MessageHeader:
        """From what `encoded` gave.

        Raises:
            LdtError: that is no header.
        """
        if message.dtype is not torch.uint8 or message.shape != ((_LENGTH + 1) * 8,):
            raise LdtError(
                f"received {message.numel()} elements of {message.dtype} where the header of a message was expected, which "
                f"has {(_LENGTH + 1) * 8} bytes"
            )
        numbers = message.view(torch.int64)[:_LENGTH]
        iteration, tag, form, count, *rest = numbers.tolist()
        most = {_ABSENT: 0, _TENSOR: 1, _TUPLE: MAX_PARTS}.get(form, -1)
        rows = [rest[i * _PART : (i + 1) * _PART] for i in range(max(0, min(count, MAX_PARTS)))]
        fits = 0 <= count <= most and (form != _TENSOR or count == 1) and not any(rest[len(rows) * _PART :])
        if not fits or not all(map(_is_part, rows)):
            raise LdtError(f"received {numbers[:_FIXED].tolist()}… where the header of a message was expected")
        return cls(iteration, tag, tuple(map(_part, rows)), form)

    @staticmethod
    def room() -> torch.Tensor:
        """For a header that is to come, without its mark."""
        return torch.zeros((_LENGTH + 1) * 8, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """Of all parts together: what crosses."""
        return sum(part.num_bytes for part in self.parts if part is not None)

    def tensors_of(self, content: Any) -> list[torch.Tensor | None]:
        """The parts of the content that this is the header of."""
        if self.form == _ABSENT:
            return []
        return [content] if self.form == _TENSOR else list(content)

    def content(self, tensors: list[torch.Tensor | None]) -> Any:
        """What the sender gave, from its parts."""
        if self.form == _ABSENT:
            return None
        return tensors[0] if self.form == _TENSOR else tuple(tensors)

    def require(self, iteration: int, tag: int, expected: Specs | None) -> None:
        """Is it the message that is due, of the shapes that are due where they are known? Absent ones always are.

        Raises:
            LdtError: it is not; the message has both.
        """
        if (self.iteration, self.tag) != (iteration, tag):
            raise LdtError(
                f"expected message {tag} of iteration {iteration}, got message {self.tag} of iteration {self.iteration}"
            )
        if expected is None or self.form == _ABSENT:
            return
        fits = len(self.parts) == len(expected) and all(
            mine is None or mine == due for mine, due in zip(self.parts, expected, strict=True)
        )
        if not fits:
            raise LdtError(f"expected {_named(expected)}, got {_named(self.parts)}")


def specs_of(content: Any) -> Specs:
    """Shape and dtype of each part of a tensor or a tuple.

    Raises:
        LdtError: something else, or too many parts or dimensions.
    """
    parts = (content,) if isinstance(content, torch.Tensor) else content
    if not isinstance(parts, (tuple, list)) or not all(
        part is None or isinstance(part, torch.Tensor) for part in parts
    ):
        raise LdtError(
            f"a stage hands over a tensor, a tuple of tensors, or None; got {_described(content)} (pass sizes on as an "
            "integer tensor)"
        )
    for part in parts:
        if part is not None and (part.dim() > MAX_DIMS or part.dtype not in _DTYPES):
            raise LdtError(f"a tensor of {part.dim()} dimensions and {part.dtype} cannot be sent; at most {MAX_DIMS}")
    if len(parts) > MAX_PARTS:
        raise LdtError(f"a message has at most {MAX_PARTS} tensors, got {len(parts)}; stack those of one shape")
    return tuple(None if part is None else TensorSpec(tuple(part.shape), part.dtype) for part in parts)


def _is_part(numbers: list[int]) -> bool:
    dtype, dims, *sizes = numbers
    if dtype == _NO_PART:
        return not any(numbers[1:])
    if not 0 <= dtype < len(_DTYPES) or not 0 <= dims <= MAX_DIMS or min(sizes) < 0 or any(sizes[dims:]):
        return False
    # Before room is made: a size is a number that another machine sent.
    return math.prod(sizes[:dims]) * _DTYPES[dtype].itemsize <= MAX_PART_BYTES


def _part(numbers: list[int]) -> TensorSpec | None:
    dtype, dims, *sizes = numbers
    return None if dtype == _NO_PART else TensorSpec(tuple(sizes[:dims]), _DTYPES[dtype])


def _named(parts: Specs) -> str:
    def one(part: TensorSpec | None) -> str:
        return "nothing" if part is None else f"{list(part.shape)} {str(part.dtype).removeprefix('torch.')}"

    return ", ".join(map(one, parts)) or "nothing"


def _described(content: Any) -> str:
    if isinstance(content, (tuple, list)):
        return f"a {type(content).__name__} of {', '.join(sorted({type(part).__name__ for part in content}))}"
    return type(content).__name__
