"""One stream's protocol state: packets in, effects out; the host's doings in, headers out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.hypervisor.vsock.connection import Connection, Effect, State, StreamBroke
from services.hypervisor.vsock.errors import DeviceBug
from services.hypervisor.vsock.packet import (
    HEADER_SIZE,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    Header,
    Op,
    decode,
    reset_for,
)

WINDOW = 1000


def packet(op: int, length: int = 0, flags: int = 0, alloc: int = 4096, forwarded: int = 0) -> Header:
    return Header(42, 2, 1024, 5000, length, 1, op, flags, alloc, forwarded)


def waiting() -> Connection:
    return Connection(guest_cid=42, local_port=5000, peer_port=1024, window=WINDOW)


def connecting() -> Connection:
    connection = waiting()
    assert said(connection).op == Op.REQUEST
    return connection


def opened(alloc: int = 4096) -> Connection:
    connection = connecting()
    assert connection.receive(packet(Op.RESPONSE, alloc=alloc)) == Effect.OPENED
    return connection


def said(connection: Connection) -> Header:
    data = connection.next_control()
    assert data is not None
    assert len(data) == HEADER_SIZE
    return decode(data)


def test_a_header_survives_the_wire() -> None:
    header = Header(1 << 40, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert decode(header.encode()) == header


def test_a_stream_is_asked_for_once_and_opens() -> None:
    connection = connecting()
    assert connection.next_control() is None
    assert connection.credit == 0
    assert connection.receive(packet(Op.RESPONSE, alloc=10)) == Effect.OPENED
    assert connection.credit == 10


def test_a_refused_stream_may_be_asked_for_again() -> None:
    connection = connecting()
    assert connection.receive(packet(Op.RST)) == Effect.REFUSED
    connection.retry()
    assert said(connection).op == Op.REQUEST


def test_credit_of_the_guest_is_honoured() -> None:
    connection = opened(alloc=100)
    decode(connection.data(100))
    assert connection.credit == 0
    assert connection.wants_credit
    request = connection.credit_request()
    assert request is not None
    assert decode(request).op == Op.CREDIT_REQUEST
    # An answer that gives nothing does not make us ask again.
    connection.receive(packet(Op.CREDIT_UPDATE, alloc=100, forwarded=0))
    assert connection.credit_request() is None
    connection.receive(packet(Op.CREDIT_UPDATE, alloc=100, forwarded=60))
    assert connection.credit == 60
    with pytest.raises(DeviceBug):
        connection.data(61)


def test_counters_wrap_at_32_bits() -> None:
    connection = opened(alloc=1 << 31)
    forwarded = 0
    for _ in range(5):
        connection.data(1 << 30)
        forwarded = (forwarded + (1 << 30)) & 0xFFFFFFFF
        connection.receive(packet(Op.CREDIT_UPDATE, alloc=1 << 31, forwarded=forwarded))
        assert connection.credit == 1 << 31


@pytest.mark.parametrize("claimed", [101, 0xFFFFFFFF, 1 << 31])
def test_a_guest_that_claims_more_than_was_sent_gains_nothing(claimed: int) -> None:
    connection = opened(alloc=100)
    connection.data(100)
    connection.receive(packet(Op.CREDIT_UPDATE, alloc=100, forwarded=claimed))
    assert connection.credit == 0


def test_an_older_count_that_comes_late_is_old_news() -> None:
    connection = opened(alloc=100)
    connection.data(100)
    connection.receive(packet(Op.CREDIT_UPDATE, alloc=100, forwarded=90))
    connection.receive(packet(Op.CREDIT_UPDATE, alloc=100, forwarded=50))
    assert connection.credit == 90


def test_a_guest_that_takes_its_buffer_back_stops_us() -> None:
    connection = opened(alloc=100)
    connection.data(50)
    connection.receive(packet(Op.CREDIT_UPDATE, alloc=10))
    assert connection.credit == 0


def test_our_window_is_enforced_and_reopened_as_the_host_reads() -> None:
    connection = opened()
    assert connection.receive(packet(Op.RW, WINDOW)) == Effect.DATA
    with pytest.raises(StreamBroke):
        connection.receive(packet(Op.RW, 1))
    connection.delivered(WINDOW // 4 - 1)
    assert connection.next_control() is None
    connection.delivered(1)
    update = said(connection)
    assert (update.op, update.buf_alloc, update.fwd_cnt) == (Op.CREDIT_UPDATE, WINDOW, WINDOW // 4)
    assert connection.receive(packet(Op.RW, WINDOW // 4)) == Effect.DATA


def test_a_credit_request_is_answered() -> None:
    connection = opened()
    connection.receive(packet(Op.CREDIT_REQUEST))
    assert said(connection).op == Op.CREDIT_UPDATE


def test_delivering_more_than_came_is_our_defect() -> None:
    connection = opened()
    with pytest.raises(DeviceBug):
        connection.delivered(1)


def test_each_side_may_finish_on_its_own() -> None:
    connection = opened()
    assert connection.receive(packet(Op.SHUTDOWN, flags=SHUTDOWN_SEND)) == Effect.NO_MORE_DATA
    assert connection.receive(packet(Op.SHUTDOWN, flags=SHUTDOWN_SEND)) == Effect.NONE
    assert connection.credit > 0
    connection.finish(SHUTDOWN_SEND)
    assert said(connection).flags == SHUTDOWN_SEND
    assert connection.both_sent_all
    assert connection.state is State.OPEN


def test_a_guest_that_reads_nothing_more_gets_nothing_more() -> None:
    connection = opened()
    assert connection.receive(packet(Op.SHUTDOWN, flags=SHUTDOWN_RECEIVE)) == Effect.NO_MORE_WANTED
    assert connection.credit == 0
    assert not connection.wants_credit


def test_our_end_waits_for_the_guests_reset() -> None:
    connection = opened()
    connection.finish(SHUTDOWN_BOTH)
    assert said(connection).flags == SHUTDOWN_BOTH
    assert connection.state is State.CLOSING
    assert connection.receive(packet(Op.RW, 10)) == Effect.DATA, "it may have been on its way"
    assert connection.receive(packet(Op.RST)) == Effect.GONE
    assert not connection.wants_control
    assert connection.receive(packet(Op.RW, 10)) == Effect.NONE, "it is closed"


def test_the_guests_end_is_confirmed() -> None:
    connection = opened()
    effect = connection.receive(packet(Op.SHUTDOWN, flags=SHUTDOWN_BOTH))
    assert effect == Effect.NO_MORE_DATA | Effect.NO_MORE_WANTED | Effect.GONE
    assert said(connection).op == Op.RST
    assert connection.next_control() is None


def test_breaking_off_is_told_only_to_a_guest_that_has_heard_of_the_stream() -> None:
    unheard = waiting()
    unheard.abort()
    assert unheard.next_control() is None
    heard = connecting()
    heard.abort()
    assert said(heard).op == Op.RST
    forgotten = opened()
    forgotten.forget()
    assert forgotten.next_control() is None


@pytest.mark.parametrize("op", [Op.REQUEST, Op.RESPONSE, 0, 8, 0xFFFF])
def test_what_an_open_stream_does_not_allow_breaks_it(op: int) -> None:
    with pytest.raises(StreamBroke):
        opened().receive(packet(op))


@pytest.mark.parametrize("op", [Op.REQUEST, Op.RW, Op.SHUTDOWN])
def test_what_comes_before_the_answer_breaks_the_stream(op: int) -> None:
    with pytest.raises(StreamBroke):
        connecting().receive(packet(op, length=1, flags=1))


def test_data_after_the_guests_end_breaks_the_stream() -> None:
    connection = opened()
    connection.receive(packet(Op.SHUTDOWN, flags=SHUTDOWN_SEND))
    with pytest.raises(StreamBroke):
        connection.receive(packet(Op.RW, 1))


def test_a_reset_is_never_answered_with_a_reset() -> None:
    assert reset_for(packet(Op.RST)) is None
    answer = reset_for(packet(Op.REQUEST))
    assert answer is not None
    assert (answer.src_cid, answer.dst_cid, answer.src_port, answer.dst_port) == (2, 42, 5000, 1024)
    assert answer.op == Op.RST


STEPS = st.one_of(
    st.tuples(
        st.just("packet"),
        st.integers(0, 9),
        st.integers(0, 2 * WINDOW),
        st.integers(0, 4),
        st.integers(0, 0xFFFFFFFF),
        st.integers(0, 0xFFFFFFFF),
    ),
    st.tuples(st.just("deliver")),
    st.tuples(st.just("send"), st.integers(1, 5000)),
    st.tuples(st.just("finish"), st.integers(0, 3)),
    st.tuples(st.just("control")),
    st.tuples(st.just("abort")),
    st.tuples(st.just("retry")),
)


@given(st.lists(STEPS, max_size=60))
def test_no_order_of_events_confuses_a_stream(steps: list[tuple[str, *tuple[int, ...]]]) -> None:
    """It never holds more than its window, never sends more than its credit, never ends twice."""
    connection = waiting()
    for kind, *values in steps:
        if kind == "packet":
            op, length, flags, alloc, forwarded = values
            try:
                connection.receive(packet(op, length, flags, alloc, forwarded))
            except StreamBroke:
                connection.abort()
        elif kind == "deliver":
            connection.delivered(connection.held // 2)
        elif kind == "send":
            count = min(values[0], connection.credit)
            if count:
                connection.data(count)
        elif kind == "finish":
            connection.finish(values[0])
        elif kind == "control":
            wanted = connection.wants_control
            assert (connection.next_control() is not None) == wanted
        elif kind == "abort":
            connection.abort()
        elif connection.state is State.CONNECTING:
            connection.retry()
        assert 0 <= connection.held <= WINDOW
        assert connection.credit >= 0
    for _ in range(8):
        if connection.next_control() is None:
            break
    assert not connection.wants_control, "it has no more to say once it has said it"
