"""Messages between PID 1 and the agent: any size, with their descriptors, none leaked."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guest import wire

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Both ends of a channel."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        yield one, other


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(), values, max_size=4))
def test_a_message_arrives_as_it_was_sent(pair: Pair, message: wire.Message) -> None:
    wire.send(pair[0], message)
    assert wire.receive(pair[1]) == (message, [])


@pytest.mark.parametrize("size", [0, 32700, 32768, 32769, 4 << 20])
def test_long_messages_and_descriptors_travel_together(pair: Pair, size: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    read, write = os.pipe()
    wire.send(pair[0], {"data": b"x" * size}, (write, read))
    got = wire.receive(pair[1])
    assert got is not None
    message, fds = got
    assert message == {"data": b"x" * size}
    os.write(fds[0], b"through")
    assert os.read(fds[1], 10) == b"through"
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in (read, write, *fds):
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_end_and_an_empty_channel_are_told_apart(pair: Pair) -> None:
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        wire.receive(pair[1])
    pair[0].close()
    assert wire.receive(pair[1]) is None
