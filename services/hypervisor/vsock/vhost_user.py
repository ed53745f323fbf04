"""The vhost-user protocol, back-end side, without I/O (QEMU docs, interop/vhost-user.rst).

Bytes and descriptors go in, events and reply bytes come out. Every length is known before its
bytes are asked for, every index is checked before it is used; whatever the front-end has not
negotiated is refused. A descriptor belongs to the caller until an event hands it over.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

from services.hypervisor.vsock.errors import BackendPeerBroke
from services.hypervisor.vsock.memory import ADDRESS_LIMIT, Region

HEADER = struct.Struct("<III")
"""request, flags, body size."""
U64 = struct.Struct("<Q")
VRING_STATE = struct.Struct("<II")
VRING_ADDRESS = struct.Struct("<IIQQQQ")
MEMORY_COUNT = struct.Struct("<II")
MEMORY_REGION = struct.Struct("<QQQQ")
CONFIG = struct.Struct("<III")

VERSION = 0x1
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8
FLAG_MASK = 0xF

F_PROTOCOL_FEATURES = 1 << 30
F_VERSION_1 = 1 << 32
FEATURES = F_VERSION_1 | F_PROTOCOL_FEATURES
"""Neither indirect descriptors nor event indices: each is one more thing a guest can get wrong."""

P_MQ = 1 << 0
P_REPLY_ACK = 1 << 3
P_CONFIG = 1 << 9
PROTOCOL_FEATURES = P_MQ | P_REPLY_ACK | P_CONFIG
"""Without MQ QEMU allows one queue, without CONFIG it has no guest CID to show."""

QUEUES = 2
"""Receive and transmit; the event queue stays in QEMU."""
MAX_QUEUE_SIZE = 1024
"""QEMU's VIRTQUEUE_MAX_SIZE; its vsock device uses 128."""
MAX_REGIONS = 8
"""VHOST_MEMORY_BASELINE_NREGIONS, and so the most descriptors in one message."""
MAX_CONFIG = 256
"""VHOST_USER_MAX_CONFIG_SIZE."""
MAX_BODY = max(MEMORY_COUNT.size + MAX_REGIONS * MEMORY_REGION.size, CONFIG.size + MAX_CONFIG)

VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 0x100


class Request(IntEnum):
    """The front-end's requests that this device answers."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24


class RingLayout(NamedTuple):
    """Where a split virtqueue lies in the machine process, and where to go on in it."""

    size: int
    descriptors: int
    available: int
    used: int
    base: int

    def extents(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(address, length) of the descriptor table, the available ring and the used ring."""
        return (
            (self.descriptors, 16 * self.size),
            (self.available, 4 + 2 * self.size),
            (self.used, 4 + 8 * self.size),
        )


class MemoryTable(NamedTuple):
    """Guest RAM is (now) these regions."""

    regions: tuple[Region, ...]


class RingStart(NamedTuple):
    """The ring may be used from now on, if it is enabled; `kick` is now the receiver's to close."""

    queue: int
    layout: RingLayout
    kick: int


class RingKick(NamedTuple):
    """A started ring is kicked through another descriptor, now the receiver's to close."""

    queue: int
    kick: int


class RingCall(NamedTuple):
    """Interrupts of the ring go to `fd` (or nowhere, if None), now the receiver's to close."""

    queue: int
    fd: int | None


class RingError(NamedTuple):
    """A broken ring is told through `fd` (or not, if None), now the receiver's to close."""

    queue: int
    fd: int | None


class RingEnable(NamedTuple):
    """The ring is switched on or off, keeping its place."""

    queue: int
    enabled: bool


class RingStop(NamedTuple):
    """The ring must not be touched any more; answer with `Backend.base_reply`."""

    queue: int


class Discard(NamedTuple):
    """Descriptors that came along and are not needed: close them."""

    fds: tuple[int, ...]


class Reply(NamedTuple):
    """Send these bytes once the events before it have been handled."""

    data: bytes


Event = MemoryTable | RingStart | RingKick | RingCall | RingError | RingEnable | RingStop | Discard | Reply


class _Vring:
    __slots__ = ("addresses", "base", "enabled", "size", "started")

    def __init__(self) -> None:
        self.size = 0
        self.base = 0
        self.addresses: tuple[int, int, int] | None = None
        self.started = False
        self.enabled = False


class Backend:
    """One front-end's session. `wanted` says how many bytes to read next; `receive` takes them."""

    def __init__(self, guest_cid: int) -> None:
        self._config = U64.pack(guest_cid)
        self._vrings = tuple(_Vring() for _ in range(QUEUES))
        self._features = 0
        self._protocol_features = 0
        self._header: tuple[int, int, int] | None = None
        self._buffer = b""
        self._fds: tuple[int, ...] = ()
        self._handlers: dict[int, Callable[[bytes, tuple[int, ...]], list[Event]]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._nothing,
            Request.RESET_OWNER: self._nothing,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.GET_CONFIG: self._get_config,
        }

    @property
    def wanted(self) -> int:
        """How many more bytes complete the header or the body; never above `MAX_BODY`."""
        whole = HEADER.size if self._header is None else self._header[2]
        return whole - len(self._buffer)

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> list[Event]:
        """Take at most `wanted` bytes and the descriptors that came with them.

        Returns:
            What they complete, in order; empty while the message is incomplete.

        Raises:
            BackendPeerBroke: the front-end broke the protocol; drop it. `undelivered` then names
                the descriptors that no event has handed over.
        """
        assert 0 < len(data) <= self.wanted
        if fds:
            if self._fds or self._header is not None or self._buffer:
                self._fds += tuple(fds)
                raise BackendPeerBroke("descriptors came in the middle of a message")
            self._fds = tuple(fds)
        self._buffer += data
        if self.wanted:
            return []
        if self._header is None:
            request, flags, size = HEADER.unpack(self._buffer)
            if request not in self._handlers:
                raise BackendPeerBroke(f"request {request} was not negotiated")
            if flags & ~FLAG_MASK or flags & 0x3 != VERSION or flags & FLAG_REPLY:
                raise BackendPeerBroke(f"request {request} has flags {flags:#x}")
            if size > MAX_BODY:
                raise BackendPeerBroke(f"request {request} has a body of {size} bytes of at most {MAX_BODY}")
            self._header, self._buffer = (request, flags, size), b""
            if size:
                return []
        return self._complete()

    @property
    def undelivered(self) -> tuple[int, ...]:
        """Descriptors received for a message that has not been completed."""
        return self._fds

    def base_reply(self, index: int, base: int) -> bytes:
        """The answer that a `RingStop` asks for: the next available index."""
        return _message(Request.GET_VRING_BASE, VRING_STATE.pack(index, base))

    def _complete(self) -> list[Event]:
        assert self._header is not None
        (request, flags, _), body = self._header, self._buffer
        events = self._handlers[request](body, self._fds)
        self._header, self._buffer, self._fds = None, b"", ()
        answered = any(isinstance(event, Reply | RingStop) for event in events)
        if flags & FLAG_NEED_REPLY and self._protocol_features & P_REPLY_ACK and not answered:
            events.append(Reply(_message(request, U64.pack(0))))
        return events

    # The handlers: one request each. `fds` has been received with the message.

    def _nothing(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        _expect(body, 0, fds)
        return []

    def _get_features(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        _expect(body, 0, fds)
        return [Reply(_message(Request.GET_FEATURES, U64.pack(FEATURES)))]

    def _set_features(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        _expect(body, U64.size, fds)
        (self._features,) = U64.unpack(body)
        if self._features & ~FEATURES:
            raise BackendPeerBroke(f"features {self._features:#x} were not offered")
        return []

    def _get_protocol_features(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        _expect(body, 0, fds)
        return [Reply(_message(Request.GET_PROTOCOL_FEATURES, U64.pack(PROTOCOL_FEATURES)))]

    def _set_protocol_features(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        _expect(body, U64.size, fds)
        (self._protocol_features,) = U64.unpack(body)
        if self._protocol_features & ~PROTOCOL_FEATURES:
            raise BackendPeerBroke(f"protocol features {self._protocol_features:#x} were not offered")
        return []

    def _get_queue_num(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        _expect(body, 0, fds)
        return [Reply(_message(Request.GET_QUEUE_NUM, U64.pack(QUEUES)))]

    def _get_config(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        _expect(body, None, fds)
        if len(body) < CONFIG.size:
            raise BackendPeerBroke("GET_CONFIG is too short")
        offset, size, flags = CONFIG.unpack_from(body)
        if len(body) != CONFIG.size + size or offset + size > len(self._config):
            raise BackendPeerBroke(f"GET_CONFIG of {size} bytes at {offset}")
        payload = self._config[offset : offset + size]
        return [Reply(_message(Request.GET_CONFIG, CONFIG.pack(offset, size, flags) + payload))]

    def _set_mem_table(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        if len(body) < MEMORY_COUNT.size:
            raise BackendPeerBroke("SET_MEM_TABLE is too short")
        count, _padding = MEMORY_COUNT.unpack_from(body)
        if count > MAX_REGIONS or len(body) != MEMORY_COUNT.size + count * MEMORY_REGION.size:
            raise BackendPeerBroke(f"SET_MEM_TABLE of {count} regions in {len(body)} bytes")
        if len(fds) != count:
            raise BackendPeerBroke(f"SET_MEM_TABLE of {count} regions with {len(fds)} descriptors")
        regions = tuple(
            Region(guest, size, user)
            for guest, size, user, _offset in MEMORY_REGION.iter_unpack(body[MEMORY_COUNT.size :])
        )
        return [Discard(fds), MemoryTable(regions)]

    def _set_vring_num(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        ring, _, size = self._stopped_ring(body, fds)
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise BackendPeerBroke(f"a queue of {size} entries")
        ring.size = size
        return []

    def _set_vring_base(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        ring, _, base = self._stopped_ring(body, fds)
        if base > 0xFFFF:
            raise BackendPeerBroke(f"a queue starts at index {base}")
        ring.base = base
        return []

    def _set_vring_addr(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        _expect(body, VRING_ADDRESS.size, fds)
        index, flags, descriptors, used, available, _log = VRING_ADDRESS.unpack(body)
        ring = self._ring(index)
        if ring.started:
            raise BackendPeerBroke(f"queue {index} was moved while it ran")
        if flags:
            raise BackendPeerBroke(f"queue {index} asks for logging, which was not offered")
        # Alignment: virtio 1.2, 2.7 "Split Virtqueues".
        if (
            descriptors % 16
            or available % 2
            or used % 4
            or max(descriptors, used, available) >= ADDRESS_LIMIT
        ):
            raise BackendPeerBroke(f"queue {index} lies at an impossible address")
        ring.addresses = (descriptors, available, used)
        return []

    def _get_vring_base(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        _expect(body, VRING_STATE.size, fds)
        index, _ = VRING_STATE.unpack(body)
        ring = self._ring(index)
        if not ring.started:
            return [Reply(self.base_reply(index, ring.base))]
        ring.started = ring.enabled = False
        return [RingStop(index)]

    def _set_vring_kick(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        index, fd = self._ring_fd(body, fds)
        ring = self._ring(index)
        if fd is None:
            raise BackendPeerBroke(f"queue {index} asks to be polled")
        if ring.started:
            return [RingKick(index, fd)]
        if not ring.size or ring.addresses is None:
            raise BackendPeerBroke(f"queue {index} was started before it was laid out")
        ring.started = True
        events: list[Event] = [RingStart(index, RingLayout(ring.size, *ring.addresses, ring.base), fd)]
        # "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in
        # the enabled state"; QEMU before 7.2 does not set that bit for devices other than net.
        if not self._features & F_PROTOCOL_FEATURES:
            ring.enabled = True
        if ring.enabled:
            events.append(RingEnable(index, True))
        return events

    def _set_vring_call(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        index, fd = self._ring_fd(body, fds)
        return [RingCall(index, fd)]

    def _set_vring_err(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        index, fd = self._ring_fd(body, fds)
        return [RingError(index, fd)]

    def _set_vring_enable(self, body: bytes, fds: tuple[int, ...]) -> list[Event]:
        _expect(body, VRING_STATE.size, fds)
        index, enabled = VRING_STATE.unpack(body)
        ring = self._ring(index)
        if enabled > 1:
            raise BackendPeerBroke(f"queue {index} is enabled with {enabled}")
        ring.enabled = bool(enabled)
        return [RingEnable(index, ring.enabled)] if ring.started else []

    def _ring(self, index: int) -> _Vring:
        if index >= QUEUES:
            raise BackendPeerBroke(f"queue {index} does not exist")
        return self._vrings[index]

    def _stopped_ring(self, body: bytes, fds: tuple[int, ...]) -> tuple[_Vring, int, int]:
        _expect(body, VRING_STATE.size, fds)
        index, value = VRING_STATE.unpack(body)
        ring = self._ring(index)
        if ring.started:
            raise BackendPeerBroke(f"queue {index} was changed while it ran")
        return ring, index, value

    def _ring_fd(self, body: bytes, fds: tuple[int, ...]) -> tuple[int, int | None]:
        _expect(body, U64.size, None)
        (value,) = U64.unpack(body)
        index, missing = value & VRING_INDEX_MASK, bool(value & VRING_NO_FD)
        if value & ~(VRING_INDEX_MASK | VRING_NO_FD) or len(fds) != (0 if missing else 1):
            raise BackendPeerBroke(
                f"a queue's descriptor message holds {value:#x} and {len(fds)} descriptors"
            )
        self._ring(index)
        return index, None if missing else fds[0]


def _expect(body: bytes, size: int | None, fds: tuple[int, ...] | None) -> None:
    """Refuse a body of another size, and descriptors where none belong."""
    if size is not None and len(body) != size:
        raise BackendPeerBroke(f"a body of {len(body)} bytes where {size} belong")
    if fds:
        raise BackendPeerBroke(f"{len(fds)} descriptors where none belong")


def _message(request: int, body: bytes) -> bytes:
    return HEADER.pack(request, VERSION | FLAG_REPLY, len(body)) + body
