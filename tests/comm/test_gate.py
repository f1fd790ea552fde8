"""The gate refuses what is not declared to cross, and counts what is."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldt_schedules.comm.declared import MESSAGES, problem_of
from ldt_schedules.comm.gate import Gate, ResidencyError
from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.planning.dependencies import What

ROOT = Path(__file__).parents[2]
SPEC = TensorSpec((12, 2, 32), torch.float32)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros((2, 12), dtype=torch.int64),  # tokens
        torch.zeros((12, 2, 32), dtype=torch.int64),  # tokens in an activation's shape
        torch.zeros((2, 12)),  # losses
        torch.zeros((12, 2, 64)),  # logits of a vocabulary of 64
        torch.zeros((12, 2, 32), dtype=torch.float64),
        torch.zeros((32, 32)),  # a weight
        torch.zeros((12, 2)),
        torch.zeros((6, 2, 32)),
    ],
)
@pytest.mark.parametrize("what", [What.ACTIVATION, What.GRADIENT])
def test_a_tensor_that_is_not_the_declared_one(tensor, what):
    gate = Gate("edge")
    with pytest.raises(ResidencyError, match=r"may not leave the edge: declared is the .* \[12, 2, 32\] float32"):
        gate.check_tensor(tensor, SPEC, what)
    gate.check_tensor(torch.zeros(SPEC.shape), SPEC, what)


def test_a_tensor_of_integers_cannot_be_declared():
    tokens = torch.zeros((2, 12), dtype=torch.int64)
    with pytest.raises(ResidencyError):
        Gate("edge").check_tensor(tokens, TensorSpec((2, 12), torch.int64), What.ACTIVATION)
    with pytest.raises(ResidencyError):
        Gate("edge").check_tensor(torch.zeros(SPEC.shape), SPEC, What.WEIGHT_GRAD)


@pytest.mark.parametrize(
    "numbers", [torch.zeros(9, dtype=torch.float64), torch.zeros(2), torch.zeros(1, dtype=torch.int64)]
)
def test_sums_are_few_and_float64(numbers):
    gate = Gate("edge")
    with pytest.raises(ResidencyError, match="at most 8, float64"):
        gate.add_scalars(numbers, "gradient norms")
    gate.add_scalars(torch.zeros(8, dtype=torch.float64), "gradient norms")
    assert gate.ledger.sent["scalars"].num_bytes == 64


HEADER = {"step": 3, "shapes": [[12, 2, 32]], "told": [{"segments": [[6, 6]]}], "dtype": "float32"}


@pytest.mark.parametrize(
    ("what", "message", "problem"),
    [
        ("tokens", {"ids": [1, 2, 3]}, "no message that is declared"),
        ("header", {**HEADER, "tokens": [1, 2]}, "undeclared fields: tokens"),
        ("header", {**HEADER, "told": [{"segments": [[12]], "labels": [4, 5]}]}, "told: undeclared fields: labels"),
        ("header", {**HEADER, "told": {"segments": [[12]]}}, "not one object for each microbatch"),
        ("number of tokens", {"num_tokens": 4, "loss": 1.5}, "undeclared fields: loss"),
        ("configs", {"train.lr": torch.zeros(1)}, "no JSON"),
        ("configs", {"corpus": "x" * 20_000}, "too much of it"),
        ("number of tokens", {"num_tokens": b"raw"}, "no JSON"),
    ],
)
def test_a_message_that_is_not_declared(what, message, problem):
    assert problem in str(problem_of(what, message))
    with pytest.raises(ResidencyError, match="may not leave the edge"):
        Gate("edge").send_message(what, message)


def test_a_declared_message_is_counted():
    sender, receiver = Gate("edge"), Gate("cloud")
    text = sender.send_message("header", HEADER)
    assert receiver.receive_message("header", text.encode()) == HEADER
    assert sender.ledger.sent["header"].num_bytes == receiver.ledger.received["header"].num_bytes == len(text)
    json.dumps(sender.ledger.content())
    assert all(declared.says for declared in MESSAGES.values())


COLLECTIVES = {
    "send",
    "allreduce",
    "allgather",
    "broadcast",
    "alltoall",
    "reduce",
    "reduce_scatter",
    "gather",
    "scatter",
}
STORING = {"set", "compare_set", "multi_set", "add", "append"}
SPEAKING = {"send", "sendall", "sendto", "sendmsg"}
SENDING = {
    **dict.fromkeys(("group", "scalars"), COLLECTIVES),
    "store": STORING,
    **dict.fromkeys(("connection", "lines", "_lines", "socket", "stream"), SPEAKING),
}
"""What the owners of a link's parts are called, and by what they send."""

MAY_SEND = {
    "ldt_schedules/comm/link.py",
    "ldt_schedules/comm/torch_transport.py",
    "ldt_schedules/comm/message_transport.py",
    "ldt_schedules/comm/json_lines.py",
    "ldt_schedules/comm/watch.py",
    "ldt_schedules/comm/watch_server.py",
    "ldt_schedules/comm/boundary.py",  # collectives of a tensor-parallel group, inside a site
    "ldt_schedules/megatron_lm/environment.py",  # one launch for both sites: where the link is, in the launcher's store
    "ldt_schedules/comm/probe/wire.py",
    "ldt_schedules/comm/probe/figures.py",
    "ldt_schedules/comm/probe/meeting.py",
}


def test_nothing_but_the_link_sends():
    """Whoever had a link's raw group or store could go round the gate; only these files touch them."""
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "ldt_schedules").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in SENDING.get(_owner(node.func.value), ())
    }
    assert found <= MAY_SEND, found - MAY_SEND


def _owner(value: Any) -> str:
    """`group` of `x.group.send`, `store` of `store.set`."""
    return value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
