"""Batches are read once and seen twice; the header that precedes a step is checked field by field."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.runtime.batches import SharedBatches
from ldt_schedules.runtime.step_header import StepHeader


def test_the_tail_sees_the_very_objects_the_head_read():
    read = []

    def source():
        for number in range(10):
            read.append(number)
            yield {"number": number}

    batches = SharedBatches(source())
    seen = {m: next(batches.for_chunk(m)) for m in (0, 1, 2)}
    assert read == [0, 1, 2]
    for m in (1, 0, 2):
        assert next(batches.for_tail(m)) is seen[m]
    assert read == [0, 1, 2]
    batches.assert_empty()


def test_several_draws_for_one_microbatch():
    batches = SharedBatches(iter(range(100)))
    head = batches.for_chunk(0)
    assert [next(head), next(head)] == [0, 1]
    assert next(batches.for_chunk(1)) == 2
    tail = batches.for_tail(0)
    assert [next(tail), next(tail)] == [0, 1]
    with pytest.raises(LdtError, match="read more batches than the first one's for microbatch 0 \\(2\\)"):
        next(tail)
    with pytest.raises(AssertionError, match=r"\[1\]"):
        batches.assert_empty()


def test_every_other_chunk_sees_them_too_and_the_tail_takes_them_away():
    read = iter("abcdef")
    batches = SharedBatches(read)
    seen = {m: next(batches.for_chunk(m)) for m in (0, 1)}
    for m in (0, 1):
        for _ in range(2):
            middle = batches.for_chunk(m)
            assert next(middle) is seen[m]
            with pytest.raises(LdtError, match=f"a later chunk read more batches .* microbatch {m}"):
                next(middle)
    assert [next(batches.for_tail(m)) for m in (0, 1)] == ["a", "b"]
    assert next(read) == "c", "nothing was read a second time"
    batches.assert_empty()


def test_a_rank_without_data_passes_none():
    batches = SharedBatches(None)
    assert batches.for_chunk(0) is batches.for_tail(0) is None
    batches.assert_empty()


HEADER = StepHeader(step=3, forward_only=False, table_hash="abc", shapes=((16, 2, 32),) * 2, dtype="bfloat16")


def test_a_header_survives_the_wire():
    assert StepHeader.from_message(HEADER.to_message()) == HEADER
    assert HEADER.spec(1).shape == (16, 2, 32) and HEADER.spec(1).dtype is torch.bfloat16
    assert HEADER.spec(1).num_bytes == 16 * 2 * 32 * 2
    HEADER.require_agreement(HEADER)


def test_every_difference_is_named_with_both_values():
    other = replace(HEADER, step=4, table_hash="def")
    with pytest.raises(LdtError) as caught:
        HEADER.require_agreement(other)
    assert "step: edge 3, here 4" in str(caught.value)
    assert "table_hash: edge 'abc', here 'def'" in str(caught.value)
    assert "shapes" not in str(caught.value)


def test_a_header_holds_no_data():
    """What is disclosed is this list and nothing else; extend the documentation before extending the list."""
    assert set(HEADER.to_message()) == {
        "step",
        "forward_only",
        "table_hash",
        "shapes",
        "dtype",
        "told",
        "failure",
        "mistake",
        "agreed",
    }
    assert HEADER.to_message()["told"] is HEADER.to_message()["failure"] is None


def test_what_only_the_edge_knows_is_not_compared():
    told = replace(HEADER, told=({"grids": [[1, 4, 4]]}, {"grids": []}))
    assert StepHeader.from_message(told.to_message()) == told
    told.require_agreement(HEADER)
    with pytest.raises(LdtError, match="step: edge 3, here 4"):
        told.require_agreement(replace(HEADER, step=4))


def test_an_edge_that_cannot_read_its_batches_says_so_instead():
    failed = replace(HEADER, step=9, failure="the edge could not read the batches of step 9")
    for mistake, kind in ((False, LdtError), (True, ConfigError)):
        with pytest.raises(LdtError, match="the edge could not read") as caught:
            replace(failed, mistake=mistake).require_agreement(HEADER)
        assert caught.type is kind


def test_batches_drawn_at_once_go_to_their_microbatches_in_any_order():
    batches = SharedBatches(iter("abcd"))
    assert batches.draw(3) == ["a", "b", "c"]
    assert [next(batches.for_chunk(m)) for m in (2, 0, 1, 2)] == ["c", "a", "b", "c"]
    assert [next(batches.for_tail(m)) for m in (1, 2, 0)] == ["b", "c", "a"]
    batches.assert_empty()
    with pytest.raises(LdtError, match="ended at microbatch 1 of 2"):
        batches.draw(2)
