"""What crosses the link: bytes in front of every message, and the header of a step as JSON."""

from __future__ import annotations

import json
import random

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ldt_schedules.comm.message_header import MAX_PART_BYTES, MessageHeader
from ldt_schedules.runtime.step_header import MAX_ELEMENTS, StepHeader
from tests.fuzz.mutations import as_text, broken_value, everything_once
from tests.fuzz.reading import inputs, read, seeds, show

ROOM = MessageHeader.room().numel()
STEP = StepHeader(
    step=3, forward_only=False, table_hash="ab" * 32, shapes=((16, 2, 32), (8, 2, 32)), dtype="bfloat16",
    told=({"segments": [[3, 2]]}, {"segments": []}), agreed="cd" * 32,
)  # fmt: skip
FAILED = StepHeader(0, True, "", ((1,),), "float32", failure="the edge could not read its batches", mistake=True)
EXTREME = (-(2**63), 2**63 - 1, 2**62, -1, 0, 1, 2, 8, 9, 15, 16, 17, 2**31)


def judge_message(message: torch.Tensor) -> None:
    show(message.view(-1)[:80].tolist())
    header = read(MessageHeader.decoded, message)
    if header is not None:
        assert header.num_bytes <= 16 * MAX_PART_BYTES
        assert torch.equal(header.encoded()[:-8], message[:-8]), "what is read is not what was sent"


def judge_step(message: object) -> None:
    show(message)
    header = read(StepHeader.from_message, message)
    if header is not None:
        written = json.dumps(header.to_message())  # as text: a NaN is not equal to itself
        assert json.dumps(StepHeader.from_message(json.loads(written)).to_message()) == written
        for microbatch in range(header.num_microbatches):
            assert 0 < header.spec(microbatch).num_bytes <= 8 * MAX_ELEMENTS
        read(header.require_agreement, STEP)


@inputs(400)
@given(st.binary(min_size=ROOM, max_size=ROOM))
def test_bytes_of_the_right_length(content: bytes) -> None:
    judge_message(torch.frombuffer(bytearray(content), dtype=torch.uint8))


@inputs(200)
@given(st.binary(min_size=1, max_size=64))
@example(bytes(ROOM - 8))
@example(bytes(ROOM - 1))
@example(bytes(ROOM + 8))
def test_bytes_of_another_length(content: bytes) -> None:
    judge_message(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def test_no_bytes_and_no_numbers() -> None:
    for message in (torch.zeros(0, dtype=torch.uint8), torch.zeros(ROOM), torch.zeros(ROOM, 1, dtype=torch.uint8)):
        judge_message(message)


@inputs(500)
@given(seeds)
def test_headers_with_other_numbers(seed: int) -> None:
    rng = random.Random(seed)
    parts = tuple(
        None if rng.random() < 0.3 else torch.empty((1,) * rng.randint(0, 8), dtype=torch.bfloat16)
        for _ in range(rng.randint(0, 4))
    )
    message = MessageHeader.of(parts, rng.randrange(9), rng.randrange(9)).encoded()
    numbers = message.view(torch.int64)
    for _ in range(rng.randint(0, 3)):
        numbers[rng.randrange(rng.choice((5, 20, len(numbers))))] = rng.choice(EXTREME)
    judge_message(message)


def test_every_type_at_every_place_of_a_step() -> None:
    for header in (STEP, FAILED):
        good = json.loads(json.dumps(header.to_message()))
        assert StepHeader.from_message(good) == StepHeader.from_message(header.to_message()) == header
        for message in everything_once(good):
            judge_step(message)


@inputs(500)
@given(seeds)
def test_steps_with_slips(seed: int) -> None:
    rng = random.Random(seed)
    good = json.loads(json.dumps(rng.choice((STEP, FAILED)).to_message()))
    judge_step(json.loads(as_text(broken_value(good, rng))))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@inputs(200)
@given(JSON)
def test_any_json(message: object) -> None:
    judge_step(message)
