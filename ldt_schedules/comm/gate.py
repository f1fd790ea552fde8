"""The one gate through which everything goes that leaves a site, and the ledger of what went.

    executor ── tensor, declared (kind, shape, dtype) ─┐
    sums over both sites ── scalars ───────────────────┼──► gate ──► link ══════► the other site
    header, agreement ── message ──────────────────────┘     │
                                                           ledger: how many, how many bytes, and what the plan says

It refuses what is not declared: a tensor of another dtype or shape than the schedule and the step header say, a message
that `declared.py` does not know. It knows no contents: an activation that somebody has filled with something else passes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ldt_schedules.comm.crossing_plan import Count, Crossing
from ldt_schedules.comm.declared import MAX_SCALARS, SCALARS, problem_of
from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.errors import LdtError
from ldt_schedules.planning.dependencies import What

FORMAT = "ldt-ledger/1"
_TENSORS = (What.ACTIVATION, What.GRADIENT)
TENSORS = tuple(what.name.lower() for what in _TENSORS)
"""The ledger's words for them."""


class ResidencyError(LdtError):
    """Something was about to cross that is not declared to."""


Counts = defaultdict[str, Count]


def _counts() -> Counts:
    return defaultdict(Count)


@dataclass
class Ledger:
    """Of one process: what it sent to the other site, what it received from there, and what the plan said it would.

    Attributes:
        sent, received: by kind of tensor, `scalars`, or the name of a message. A sum over both sites is both, in every process.
        planned_sent, planned_received: tensors alone, from the schedule table and the header's shapes of every step.
        steps: calls of forward-backward.
    """

    sent: Counts = field(default_factory=_counts)
    received: Counts = field(default_factory=_counts)
    planned_sent: Counts = field(default_factory=_counts)
    planned_received: Counts = field(default_factory=_counts)
    steps: int = 0

    def plan(self, crossing: Crossing) -> None:
        """A step is about to begin whose table and shapes say so much."""
        self.steps += 1
        for planned, counts in ((self.planned_sent, crossing.sent), (self.planned_received, crossing.received)):
            for what, count in counts.items():
                planned[kind_of(what)].add(count.num_bytes, count.messages)

    def content(self) -> dict[str, Any]:
        """Of JSON types."""
        names = ("sent", "received", "planned_sent", "planned_received")
        counted = {name: {kind: asdict(count) for kind, count in list(getattr(self, name).items())} for name in names}
        return {"steps": self.steps, **counted}


@dataclass
class Gate:
    """Of one process.

    Attributes:
        site: for messages: what may not leave it.
    """

    site: str = ""
    ledger: Ledger = field(default_factory=Ledger)

    def check_tensor(self, tensor: torch.Tensor, declared: TensorSpec, what: What) -> None:
        """May it leave? Its pieces are then counted one by one.

        Raises:
            ResidencyError: it is neither activation nor gradient, or its dtype or shape is not the declared one's.
        """
        shape = tuple(tensor.shape)
        if what not in _TENSORS or not tensor.dtype.is_floating_point or (shape, tensor.dtype) != _pair(declared):
            raise ResidencyError(
                f"a tensor {list(shape)} {_name(tensor.dtype)} may not leave the {self.site or 'site'}: declared is the "
                f"{what.value} {list(declared.shape)} {_name(declared.dtype)}"
            )

    def count_sent(self, num_bytes: int, what: What) -> None:
        self.ledger.sent[kind_of(what)].add(num_bytes)

    def count_received(self, sizes: Sequence[int], what: What) -> None:
        """Of the pieces of a tensor that has arrived, in bytes."""
        self.ledger.received[kind_of(what)].add(sum(sizes), len(sizes))

    def add_scalars(self, vector: torch.Tensor, what: str) -> None:
        """Let the few numbers of a sum over both sites pass, to and fro.

        Raises:
            ResidencyError: they are too many, or no float64.
        """
        if vector.dtype != torch.float64 or vector.numel() > MAX_SCALARS:
            raise ResidencyError(
                f"{vector.numel()} numbers {_name(vector.dtype)} ({what}) may not leave the {self.site or 'site'}: a sum over "
                f"both sites has at most {MAX_SCALARS}, float64"
            )
        self.ledger.sent[SCALARS].add(vector.nbytes)
        self.ledger.received[SCALARS].add(vector.nbytes)

    def send_message(self, what: str, message: Mapping[str, Any]) -> str:
        """Let a message out; gives its text.

        Raises:
            ResidencyError: it is not declared, or has fields that are not.
        """
        problem = problem_of(what, message)
        if problem is not None:
            raise ResidencyError(f"a message may not leave the {self.site or 'site'}: {problem}")
        text = json.dumps(message)
        self.ledger.sent[what].add(len(text))
        return text

    def receive_message(self, what: str, text: bytes) -> Any:
        self.ledger.received[what].add(len(text))
        return json.loads(text)


def kind_of(what: What) -> str:
    """The ledger's word for a kind of tensor: `activation` or `gradient`."""
    return what.name.lower()


def _pair(spec: TensorSpec) -> tuple[tuple[int, ...], torch.dtype]:
    return spec.shape, spec.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
