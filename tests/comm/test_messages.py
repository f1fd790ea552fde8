"""Messages that describe themselves: what goes in comes out, and what is not the expected one says so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldt_schedules.comm.message_header import MAX_PARTS, MessageHeader, specs_of
from ldt_schedules.comm.message_mark import clear_mark, is_marked, view_of_mark
from ldt_schedules.comm.message_payload import packed, unpacked
from ldt_schedules.comm.ports import free_ports
from ldt_schedules.comm.ranks import connect_ranks
from ldt_schedules.errors import LdtError
from ldt_schedules.planning.channels import lane
from ldt_schedules.planning.dependencies import What

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]

tensors = st.builds(
    lambda shape, dtype: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(DTYPES),
)
contents = st.one_of(st.none(), tensors, st.lists(st.one_of(st.none(), tensors), max_size=MAX_PARTS).map(tuple))


def assert_equal(found, content):
    assert type(found) is type(content)
    parts = [(found, content)] if not isinstance(content, tuple) else zip(found, content, strict=True)
    for mine, other in parts:
        assert (mine is None) == (other is None)
        if other is not None:
            assert mine.dtype == other.dtype and torch.equal(mine, other)


@given(contents, st.integers(0, 2**40), st.integers(0, 2**30))
def test_what_goes_in_comes_out(content, iteration, tag):
    """Any content through its header as numbers and its payload as bytes."""
    header = MessageHeader.of(content, iteration, tag)
    message, payload = header.encoded(), packed(content, header)
    assert message.shape == MessageHeader.room().shape and MessageHeader.decoded(message) == header
    for buffer in (message, payload):
        view = view_of_mark(buffer)
        assert is_marked(view)
        clear_mark(buffer)
        assert not is_marked(view)
    assert not is_marked(view_of_mark(MessageHeader.room()))
    assert_equal(unpacked(payload, header), content)


@given(contents, st.dictionaries(st.integers(0, 30), st.integers(-(2**62), 2**62) | st.integers(-2, 20)))
def test_a_spoilt_header_is_refused_or_read(content, spoilt):
    """Never anything but the named error; what is read can be written again."""
    message = MessageHeader.of(content, 1, 2).encoded()
    for place, number in spoilt.items():
        message.view(torch.int64)[place] = number
    try:
        header = MessageHeader.decoded(message)
    except LdtError as error:
        assert "where the header of a message was expected" in str(error)
    else:
        assert MessageHeader.decoded(header.encoded()) == header


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (1.5, "got float"),
        ([torch.ones(1), "text"], "a list of Tensor, str"),
        ((torch.ones((1,) * 9),), "9 dimensions"),
        ((torch.ones(1, dtype=torch.complex64),), "complex64 cannot be sent"),
        ((None,) * (MAX_PARTS + 1), f"at most {MAX_PARTS} tensors, got {MAX_PARTS + 1}"),
    ],
)
def test_what_cannot_be_sent_is_refused(content, told):
    with pytest.raises(LdtError, match=told):
        specs_of(content)


def test_another_message_than_the_expected_one_is_refused():
    header = MessageHeader.of(torch.ones(2, 3), 4, 17)
    header.require(4, 17, None)
    header.require(4, 17, specs_of(torch.zeros(2, 3)))
    with pytest.raises(LdtError, match=r"expected message 18 of iteration 4, got message 17 of iteration 4"):
        header.require(4, 18, None)
    with pytest.raises(LdtError, match=r"expected \[2, 4\] float32, got \[2, 3\] float32"):
        header.require(4, 17, specs_of(torch.zeros(2, 4)))


def exchange(rank: int, port: int) -> list[object]:
    """Rank 1 receives in the order of its posts, whichever comes first; absent and empty messages have no payload."""
    with connect_ranks(rank, 2, ("127.0.0.1", port), timeout_s=20) as transport:
        there = lane(0, 1)
        sent = [
            None,
            torch.empty(0, 3),
            torch.arange(5),
            (torch.ones(2), None, torch.tensor(True)),
            torch.ones(300_000),
        ]
        if rank == 0:
            handles = [
                transport.post_send(one, None, what=What.ACTIVATION, peer=1, lane=there, tag=tag)
                for tag, one in enumerate(sent)
            ]
            for handle in handles:
                handle.wait()
            transport.wait_for_all()
            return [transport.traffic.sent_bytes]
        posted = [
            transport.post_recv(lambda: None, what=What.ACTIVATION, peer=0, lane=there, tag=tag)
            for tag in range(len(sent))
        ]
        for handle, content in reversed(list(zip(posted, sent, strict=True))):
            assert_equal(handle.wait(), content)
        transport.wait_for_all()
        return [transport.traffic.received_bytes]


def test_messages_between_processes(workers):
    (port,) = free_ports(1)
    sent, received = workers.run(exchange, [(rank, port) for rank in range(2)])
    assert sent == received == [5 * 8 + 2 * 4 + 1 + 300_000 * 4]
