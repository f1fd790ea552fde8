"""All that ever crosses from one site to the other, and what it says. What does not stand here does not cross.

Tensors are declared by the schedule (which ones) and the step header (their shapes); scalars and messages here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SCALARS = "scalars"
"""The ledger's word for what `Link.sum_over_sites` adds up."""

MAX_SCALARS = 8
MAX_TEXT = 1 << 14
_MAX_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Declared:
    """A kind of message.

    Attributes:
        says: what the other site learns from it.
        fields: the only keys that it may have; None: any name of a setting, each with one value or a list of values.
    """

    says: str
    fields: frozenset[str] | None


def _fields(*names: str) -> frozenset[str]:
    return frozenset(names)


TOLD = _fields("segments", "grids", "positions", "text", "attention")
"""Of one microbatch in the header: lengths of its segments, grids of its images `(t, h, w)`, its positions for M-RoPE, the shape
of its text, and which of its places are padding."""

_PROGRESS = ("iteration", "consumed_train_samples", "consumed_valid_samples")

MESSAGES: Mapping[str, Declared] = {
    "header": Declared(
        "which step, table, shapes and dtype; of each microbatch lengths of segments, grids of images, positions",
        _fields("step", "forward_only", "table_hash", "agreed", "shapes", "dtype", "told", "failure", "mistake"),
    ),
    "number of tokens": Declared("how many tokens of the step count in the loss", _fields("num_tokens")),
    "configs": Declared("the config's shared keys, versions, the schedule's hash; no paths", None),
    "arguments": Declared("Megatron's shared arguments, versions, the schedule's hash; no paths", None),
    "checkpoints": Declared(
        "which steps a site holds and of which run; what is wrong with them, with their path",
        _fields("steps", "loaded", "problem", "new_run", *_PROGRESS),
    ),
    "loading of checkpoints": Declared("what is wrong with a checkpoint, with its path", _fields("problem")),
    "data": Declared(
        "whether the run trains, validates and tests, and after how many samples",
        _fields("do_train", "do_valid", "do_test", "consumed_train_samples", "consumed_valid_samples"),
    ),
}
"""By the name under which they are published."""


def problem_of(what: str, message: Mapping[str, object]) -> str | None:
    """Why this message may not cross; None: it may."""
    declared = MESSAGES.get(what)
    if declared is None:
        return f"{what!r} is no message that is declared to cross; declared are {', '.join(sorted(MESSAGES))}"
    if declared.fields is not None:
        strange = sorted(set(message) - declared.fields)
        if strange:
            return f"{what} has undeclared fields: {', '.join(strange)}"
    for name, value in message.items():
        if name == "told" and what == "header":
            problem = _problem_of_told(value)
        else:
            problem = None if _numbers(value) <= _MAX_NUMBERS else "too much of it, or no JSON"
        if problem is not None:
            return f"{what}, {name}: {problem}"
    return None


def _problem_of_told(told: object) -> str | None:
    if told is None:
        return None
    if not isinstance(told, (list, tuple)) or not all(isinstance(one, Mapping) for one in told):
        return "not one object for each microbatch"
    strange = sorted({str(name) for one in told for name in one} - TOLD)
    return f"undeclared fields: {', '.join(strange)}" if strange else None


def _numbers(value: object) -> float:
    """How many values there are in it; infinite where it is none of JSON's, or a text that is too long."""
    if value is None or isinstance(value, (bool, int, float)):
        return 1
    if isinstance(value, str):
        return 1 if len(value) <= MAX_TEXT else float("inf")
    if isinstance(value, (list, tuple)):
        return sum(map(_numbers, value))
    if isinstance(value, Mapping):
        return sum(map(_numbers, value.values()))
    return float("inf")
