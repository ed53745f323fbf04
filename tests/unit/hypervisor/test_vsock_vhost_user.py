"""The vhost-user protocol without I/O: whatever the machine sends, in whatever pieces."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.hypervisor.vsock.errors import BackendPeerBroke
from services.hypervisor.vsock.memory import Region
from services.hypervisor.vsock.vhost_user import (
    FEATURES,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    MAX_BODY,
    PROTOCOL_FEATURES,
    VERSION,
    Backend,
    Discard,
    Event,
    MemoryTable,
    Reply,
    Request,
    RingCall,
    RingEnable,
    RingKick,
    RingLayout,
    RingStart,
    RingStop,
)

U64 = struct.Struct("<Q")


def feed(
    backend: Backend, request: int, body: bytes = b"", fds: tuple[int, ...] = (), flags: int = VERSION
) -> list[Event]:
    """One whole message, as the session reads it: header and descriptors first, then the body."""
    events = backend.receive(HEADER.pack(request, flags, len(body)), fds)
    if body:
        assert not events
        assert backend.wanted == len(body)
        events = backend.receive(body)
    return events


def laid_out(base: int = 0, *, enabled_from_start: bool = False) -> Backend:
    """A backend whose queue 0 can be started."""
    backend = Backend(7)
    feed(backend, Request.SET_PROTOCOL_FEATURES, U64.pack(PROTOCOL_FEATURES))
    features = 1 << 32 if enabled_from_start else FEATURES
    feed(backend, Request.SET_FEATURES, U64.pack(features))
    feed(backend, Request.SET_VRING_NUM, struct.pack("<II", 0, 128))
    feed(backend, Request.SET_VRING_BASE, struct.pack("<II", 0, base))
    feed(backend, Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, 0x1000, 0x3000, 0x2000, 0))
    return backend


def test_features_and_configuration_are_answered() -> None:
    backend = Backend(0x1122334455)
    [features] = feed(backend, Request.GET_FEATURES)
    assert isinstance(features, Reply)
    assert features.data == HEADER.pack(1, VERSION | FLAG_REPLY, 8) + U64.pack(FEATURES)
    assert FEATURES == 1 << 32 | 1 << 30
    [protocol] = feed(backend, Request.GET_PROTOCOL_FEATURES)
    assert isinstance(protocol, Reply)
    assert U64.unpack(protocol.data[12:]) == (1 << 0 | 1 << 3 | 1 << 9,)
    [queues] = feed(backend, Request.GET_QUEUE_NUM)
    assert isinstance(queues, Reply)
    assert U64.unpack(queues.data[12:]) == (2,)
    [config] = feed(backend, Request.GET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8))
    assert isinstance(config, Reply)
    assert config.data[12:] == struct.pack("<III", 0, 8, 0) + U64.pack(0x1122334455)
    [part] = feed(backend, Request.GET_CONFIG, struct.pack("<III", 4, 4, 0) + bytes(4))
    assert isinstance(part, Reply)
    assert part.data[24:] == U64.pack(0x1122334455)[4:]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 11])
def test_a_message_may_come_in_any_pieces(step: int) -> None:
    backend = laid_out()
    body = U64.pack(0)
    data = HEADER.pack(Request.SET_VRING_KICK, VERSION, len(body)) + body
    events: list[Event] = []
    fds: tuple[int, ...] = (99,)
    while data:
        assert not events
        piece = data[: min(step, backend.wanted)]
        events = backend.receive(piece, fds)
        data, fds = data[len(piece) :], ()
    assert events == [RingStart(0, RingLayout(128, 0x1000, 0x2000, 0x3000, 0), 99)]


def test_memory_regions_are_taken_and_their_files_are_not_needed() -> None:
    body = struct.pack("<II", 2, 0) + struct.pack("<QQQQ", 0, 10, 20, 30) + struct.pack("<QQQQ", 40, 5, 60, 0)
    events = feed(Backend(3), Request.SET_MEM_TABLE, body, (5, 6))
    assert events == [Discard((5, 6)), MemoryTable((Region(0, 10, 20), Region(40, 5, 60)))]


def test_a_ring_starts_by_its_kick_and_is_enabled_on_its_own() -> None:
    backend = laid_out(base=65535)
    assert feed(backend, Request.SET_VRING_ENABLE, struct.pack("<II", 1, 1)) == []
    [start] = feed(backend, Request.SET_VRING_KICK, U64.pack(0), (8,))
    assert start == RingStart(0, RingLayout(128, 0x1000, 0x2000, 0x3000, 65535), 8)
    assert feed(backend, Request.SET_VRING_ENABLE, struct.pack("<II", 0, 1)) == [RingEnable(0, True)]
    assert feed(backend, Request.SET_VRING_ENABLE, struct.pack("<II", 0, 0)) == [RingEnable(0, False)]
    assert feed(backend, Request.SET_VRING_KICK, U64.pack(0), (9,)) == [RingKick(0, 9)]
    assert feed(backend, Request.SET_VRING_CALL, U64.pack(0), (9,)) == [RingCall(0, 9)]
    assert feed(backend, Request.SET_VRING_CALL, U64.pack(0x100)) == [RingCall(0, None)]
    assert feed(backend, Request.GET_VRING_BASE, struct.pack("<II", 0, 0)) == [RingStop(0)]
    assert backend.base_reply(0, 3)[12:] == struct.pack("<II", 0, 3)


def test_without_protocol_features_a_ring_is_enabled_from_its_start() -> None:
    """QEMU before 7.2 does not acknowledge the bit for this device."""
    backend = laid_out(enabled_from_start=True)
    assert feed(backend, Request.SET_VRING_KICK, U64.pack(0), (8,))[1:] == [RingEnable(0, True)]


def test_a_ring_that_never_started_says_its_base() -> None:
    [reply] = feed(laid_out(base=12), Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
    assert isinstance(reply, Reply)
    assert reply.data[12:] == struct.pack("<II", 0, 12)


def test_an_acknowledgement_is_given_where_it_is_asked_for_and_negotiated() -> None:
    backend = Backend(3)
    need = VERSION | FLAG_NEED_REPLY
    assert feed(backend, Request.SET_OWNER, flags=need) == []
    feed(backend, Request.SET_PROTOCOL_FEATURES, U64.pack(PROTOCOL_FEATURES))
    [reply] = feed(backend, Request.SET_OWNER, flags=need)
    assert reply == Reply(HEADER.pack(Request.SET_OWNER, VERSION | FLAG_REPLY, 8) + U64.pack(0))
    assert len(feed(backend, Request.GET_FEATURES, flags=need)) == 1


ONE_REGION = struct.pack("<II", 1, 0) + bytes(32)
BROKEN = {
    "unknown request": (6, b"", ()),
    "request zero": (0, b"", ()),
    "backend request": (2000, b"", ()),
    "body where none belongs": (Request.GET_FEATURES, bytes(8), ()),
    "descriptor where none belongs": (Request.GET_FEATURES, b"", (5,)),
    "short features": (Request.SET_FEATURES, bytes(4), ()),
    "feature that was not offered": (Request.SET_FEATURES, U64.pack(1 << 28), ()),
    "protocol feature that was not offered": (Request.SET_PROTOCOL_FEATURES, U64.pack(1 << 1), ()),
    "no memory table": (Request.SET_MEM_TABLE, b"", ()),
    "memory table without descriptors": (Request.SET_MEM_TABLE, ONE_REGION, ()),
    "memory table with too many descriptors": (Request.SET_MEM_TABLE, ONE_REGION, (5, 6)),
    "nine regions": (Request.SET_MEM_TABLE, struct.pack("<II", 9, 0) + bytes(32 * 8), (5,) * 8),
    "a million regions": (Request.SET_MEM_TABLE, struct.pack("<II", 1 << 20, 0), ()),
    "queue 2": (Request.SET_VRING_NUM, struct.pack("<II", 2, 128), ()),
    "queue of zero": (Request.SET_VRING_NUM, struct.pack("<II", 0, 0), ()),
    "queue of three": (Request.SET_VRING_NUM, struct.pack("<II", 0, 3), ()),
    "queue of 2048": (Request.SET_VRING_NUM, struct.pack("<II", 0, 2048), ()),
    "base above 16 bits": (Request.SET_VRING_BASE, struct.pack("<II", 0, 1 << 16), ()),
    "misaligned descriptors": (
        Request.SET_VRING_ADDR,
        struct.pack("<IIQQQQ", 0, 0, 8, 0x3000, 0x2000, 0),
        (),
    ),
    "address with the top bit": (
        Request.SET_VRING_ADDR,
        struct.pack("<IIQQQQ", 0, 0, 1 << 63, 0x3000, 0x2000, 0),
        (),
    ),
    "logging": (Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 1, 0x1000, 0x3000, 0x2000, 0), ()),
    "kick without descriptor": (Request.SET_VRING_KICK, U64.pack(0), ()),
    "kick by polling": (Request.SET_VRING_KICK, U64.pack(0x100), ()),
    "kick with two descriptors": (Request.SET_VRING_KICK, U64.pack(0), (5, 6)),
    "kick of queue 255": (Request.SET_VRING_KICK, U64.pack(255), (5,)),
    "kick with high bits": (Request.SET_VRING_KICK, U64.pack(1 << 40), (5,)),
    "start of a queue without a layout": (Request.SET_VRING_KICK, U64.pack(1), (5,)),
    "enable with 2": (Request.SET_VRING_ENABLE, struct.pack("<II", 0, 2), ()),
    "configuration beyond its end": (Request.GET_CONFIG, struct.pack("<III", 4, 8, 0) + bytes(8), ()),
    "configuration of another size": (Request.GET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(4), ()),
    "configuration without header": (Request.GET_CONFIG, bytes(8), ()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_negotiated_or_malformed_is_refused(name: str) -> None:
    request, body, fds = BROKEN[name]
    with pytest.raises(BackendPeerBroke):
        feed(laid_out(), request, body, fds)


@pytest.mark.parametrize("flags", [0, 2, VERSION | FLAG_REPLY, VERSION | 0x10, 0xFFFFFFFF])
def test_wrong_flags_are_refused(flags: int) -> None:
    with pytest.raises(BackendPeerBroke, match="flags"):
        feed(Backend(3), Request.GET_FEATURES, flags=flags)


def test_a_long_body_is_refused_before_it_is_read() -> None:
    with pytest.raises(BackendPeerBroke, match="body"):
        Backend(3).receive(HEADER.pack(Request.SET_MEM_TABLE, VERSION, 0xFFFFFFFF))


@pytest.mark.parametrize(
    "request_id", [Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ADDR]
)
def test_a_running_queue_cannot_be_changed(request_id: Request) -> None:
    backend = laid_out()
    feed(backend, Request.SET_VRING_KICK, U64.pack(0), (8,))
    body = (
        struct.pack("<IIQQQQ", 0, 0, 0x1000, 0x3000, 0x2000, 0)
        if request_id == Request.SET_VRING_ADDR
        else struct.pack("<II", 0, 64)
    )
    with pytest.raises(BackendPeerBroke, match="while it ran"):
        feed(backend, request_id, body)


def test_descriptors_of_an_unfinished_message_are_still_the_callers() -> None:
    backend = Backend(3)
    backend.receive(HEADER.pack(Request.SET_MEM_TABLE, VERSION, 40), (5,))
    assert list(backend.undelivered) == [5]
    with pytest.raises(BackendPeerBroke, match="middle"):
        backend.receive(b"x", (6,))
    assert list(backend.undelivered) == [5, 6]


@given(st.data())
def test_any_bytes_are_taken_or_refused_within_bounds(data: st.DataObject) -> None:
    backend = laid_out()
    for _ in range(20):
        assert 0 < backend.wanted <= MAX_BODY
        if data.draw(st.booleans()) and backend.wanted == HEADER.size:
            request = data.draw(st.sampled_from(list(Request)))
            size = data.draw(st.sampled_from([0, 8, 12, 20, 40, 72, 264]))
            piece = HEADER.pack(request, VERSION, size)
        else:
            piece = data.draw(st.binary(min_size=1, max_size=backend.wanted))
        try:
            backend.receive(piece, tuple(data.draw(st.lists(st.just(5), max_size=2))))
        except BackendPeerBroke:
            return
