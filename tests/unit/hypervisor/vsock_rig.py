"""A vsock device in this process, with a machine and a guest driver that tests (and fuzzers) play.

The machine's side is a real unix socket with real descriptors; guest memory is a few byte arrays at
made-up addresses, whose every access outside of them fails the test.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

from services.hypervisor.vsock.device import Limits, VsockDevice
from services.hypervisor.vsock.loop import Loop
from services.hypervisor.vsock.memory import Region
from services.hypervisor.vsock.packet import HEADER_SIZE, HOST_CID, Header, Op, decode
from services.hypervisor.vsock.ring import DESC_NEXT, DESC_WRITE, DESCRIPTOR
from services.hypervisor.vsock.vhost_user import (
    F_PROTOCOL_FEATURES,
    F_VERSION_1,
    HEADER,
    MEMORY_COUNT,
    MEMORY_REGION,
    PROTOCOL_FEATURES,
    U64,
    VERSION,
    VRING_ADDRESS,
    VRING_STATE,
    Request,
)

CID = 42
PORT = 1024
REGIONS = (
    Region(guest=0, size=1 << 20, user=0x7F1000000000),
    # Follows the first in the guest, not in the machine process.
    Region(guest=1 << 20, size=1 << 20, user=0x7F0000000000),
    Region(guest=1 << 32, size=1 << 16, user=0x7F2000000000),
)
QUEUE_SIZE = 64
BUFFER = 4096


class Space:
    """Guest memory, and nothing else: the test fails if anything else is touched."""

    def __init__(self, regions: Sequence[Region] = REGIONS) -> None:
        self.pieces = [(region.user, bytearray(region.size)) for region in regions]
        self.touched = 0

    def _find(self, address: int, length: int) -> tuple[bytearray, int]:
        for start, piece in self.pieces:
            if start <= address and address + length <= start + len(piece):
                return piece, address - start
        raise AssertionError(f"{length} bytes at {address:#x} are not guest memory")

    def read(self, address: int, length: int) -> bytes:
        """See `AddressSpace.read`."""
        piece, at = self._find(address, length)
        self.touched += length
        return bytes(piece[at : at + length])

    def read_into(self, address: int, buffers: Sequence[memoryview]) -> None:
        """See `AddressSpace.read_into`."""
        for buffer in buffers:
            buffer[:] = self.read(address, len(buffer))
            address += len(buffer)

    def write(self, address: int, buffers: Sequence[bytes | memoryview]) -> None:
        """See `AddressSpace.write`."""
        data = b"".join(buffers)
        piece, at = self._find(address, len(data))
        piece[at : at + len(data)] = data
        self.touched += len(data)


def user(guest: int) -> int:
    """The machine address of a guest address."""
    for region in REGIONS:
        if region.guest <= guest < region.guest + region.size:
            return region.user + guest - region.guest
    raise AssertionError(hex(guest))


def pieces(guest: int, length: int) -> list[tuple[int, int, int]]:
    """(machine address, from, to) of the parts of a guest range, one per region."""
    found = []
    done = 0
    while done < length:
        at = guest + done
        region = next(one for one in REGIONS if one.guest <= at < one.guest + one.size)
        step = min(length - done, region.guest + region.size - at)
        found.append((user(at), done, done + step))
        done += step
    return found


class DriverQueue:
    """The driver's side of one queue."""

    def __init__(self, space: Space, base: int, size: int = QUEUE_SIZE) -> None:
        self.space = space
        self.size = size
        self.descriptors = base
        self.available = base + 16 * size
        self.used = (self.available + 4 + 2 * size + 3) & ~3
        self.index = 0
        self.seen = 0
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        for at in (self.available, self.used):
            self.poke(at, b"\0\0\0\0")

    def poke(self, guest: int, data: bytes) -> None:
        """Write at a guest address, across regions too."""
        for address, low, high in pieces(guest, len(data)):
            self.space.write(address, [data[low:high]])

    def peek(self, guest: int, length: int) -> bytes:
        """Read at a guest address, across regions too."""
        return b"".join(self.space.read(address, high - low) for address, low, high in pieces(guest, length))

    def describe(self, slot: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Write one descriptor."""
        self.poke(self.descriptors + 16 * slot, DESCRIPTOR.pack(address, length, flags, following))

    def offer(self, head: int, index: int | None = None) -> None:
        """Make the chain at `head` available (and claim that `index` is the next index)."""
        self.poke(self.available + 4 + 2 * (self.index % self.size), struct.pack("<H", head))
        self.index = (self.index + 1) & 0xFFFF if index is None else index
        self.poke(self.available + 2, struct.pack("<H", self.index))

    def add(self, buffers: Sequence[tuple[int, int]], *, write: bool) -> int:
        """Make a chain of (address, length) available; returns its head."""
        slots = [self.free.pop() for _ in buffers]
        for place, (slot, (address, length)) in enumerate(zip(slots, buffers, strict=True)):
            more = place + 1 < len(slots)
            flags = (DESC_WRITE if write else 0) | (DESC_NEXT if more else 0)
            self.describe(slot, address, length, flags, slots[place + 1] if more else 0)
        self.chains[slots[0]] = slots
        self.offer(slots[0])
        return slots[0]

    def collect(self) -> list[tuple[int, int]]:
        """The (head, length) pairs used since the last call."""
        (index,) = struct.unpack("<H", self.peek(self.used + 2, 2))
        done = []
        while self.seen != index:
            head, length = struct.unpack("<II", self.peek(self.used + 4 + 8 * (self.seen % self.size), 8))
            self.free += self.chains.pop(head, [])
            done.append((head, length))
            self.seen = (self.seen + 1) & 0xFFFF
        return done


class Rig:
    """One device, its machine, its guest's driver and its host clients. Close it."""

    def __init__(self, limits: Limits | None = None, *, queue_size: int = QUEUE_SIZE) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="rig-")
        self.space = Space()
        self.loop = Loop()
        self.states: list[str] = []
        self.logged: list[str] = []
        self.vhost_path = f"{self.directory.name}/vhost"
        self.guest_path = f"{self.directory.name}/guest"
        self.listeners = [self._listen(self.vhost_path), self._listen(self.guest_path)]
        self.device = VsockDevice(
            self.loop,
            space=self.space,
            machine_pid=os.getpid(),
            vhost_listener=self.listeners[0],
            guest_listener=self.listeners[1],
            guest_cid=CID,
            limits=limits,
            log=self.logged.append,
            on_state=self.states.append,
        )
        self.queue_size = queue_size
        self.machine: socket.socket | None = None
        self.kicks: list[int] = []
        self.calls: list[int] = []
        self.clients: list[socket.socket] = []
        self.memory = os.memfd_create("rig")
        self.reset_driver()

    def _listen(self, path: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        sock.listen(64)
        sock.setblocking(False)
        return sock

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.unplug()
        for sock in (*self.clients, *self.listeners):
            sock.close()
        self.settle()
        os.close(self.memory)
        self.directory.cleanup()

    # The loop

    def settle(self, turns: int = 4000) -> None:
        """Turn until nothing happens. The device must come to rest by itself."""
        for _ in range(turns):
            before = self.loop.events
            if not self.loop.turn(0) and self.loop.events == before:
                return
        raise AssertionError(f"the device was still busy after {turns} turns")

    # The machine

    def plug(self, *, handshake: bool = True) -> None:
        """Connect as the machine."""
        self.machine = socket.socket(socket.AF_UNIX)
        self.machine.connect(self.vhost_path)
        self.machine.setblocking(False)
        self.settle()
        if handshake:
            self.handshake()

    def unplug(self) -> None:
        """Disconnect as the machine."""
        if self.machine is not None:
            self.machine.close()
            self.machine = None
        for fd in (*self.kicks, *self.calls):
            os.close(fd)
        self.kicks, self.calls = [], []
        self.settle()

    def message(
        self, request: int, body: bytes = b"", fds: Sequence[int] = (), *, flags: int = VERSION
    ) -> bytes | None:
        """Send one message, let the device work, and return what it answered, if anything."""
        assert self.machine is not None
        self.raw(HEADER.pack(request, flags, len(body)) + body, fds)
        try:
            return self.machine.recv(4096, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes and descriptors, and let the device work."""
        assert self.machine is not None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.machine.sendmsg([data], rights)
        self.settle()

    def handshake(self, features: int = F_VERSION_1 | F_PROTOCOL_FEATURES) -> None:
        """What QEMU says until the device is set up; the driver is not up yet."""
        self.message(Request.GET_FEATURES)
        self.message(Request.GET_PROTOCOL_FEATURES)
        self.message(Request.SET_PROTOCOL_FEATURES, U64.pack(PROTOCOL_FEATURES))
        self.message(Request.GET_QUEUE_NUM)
        self.message(Request.SET_OWNER)
        self.message(Request.SET_FEATURES, U64.pack(features))
        self.memory_table()

    def memory_table(self, regions: Sequence[Region] = REGIONS) -> None:
        """Tell where guest memory is."""
        body = MEMORY_COUNT.pack(len(regions), 0) + b"".join(
            MEMORY_REGION.pack(region.guest, region.size, region.user, 0) for region in regions
        )
        self.message(Request.SET_MEM_TABLE, body, [self.memory] * len(regions))

    def reset_driver(self) -> None:
        """A driver that has initialised itself: both queues empty and at zero."""
        self.receive = DriverQueue(self.space, 0x1000, self.queue_size)
        self.transmit = DriverQueue(self.space, 0x9000, self.queue_size)

    def start(self, bases: tuple[int, int] = (0, 0), *, fill: bool = True) -> None:
        """Start both queues at `bases`."""
        for fd in (*self.kicks, *self.calls):
            os.close(fd)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        for index, queue in enumerate((self.receive, self.transmit)):
            self.message(Request.SET_VRING_NUM, VRING_STATE.pack(index, queue.size))
            self.message(Request.SET_VRING_BASE, VRING_STATE.pack(index, bases[index]))
            addresses = (user(queue.descriptors), user(queue.used), user(queue.available))
            self.message(Request.SET_VRING_ADDR, VRING_ADDRESS.pack(index, 0, *addresses, 0))
            self.message(Request.SET_VRING_KICK, U64.pack(index), [self.kicks[index]])
            self.message(Request.SET_VRING_CALL, U64.pack(index), [self.calls[index]])
        for index in range(2):
            self.message(Request.SET_VRING_ENABLE, VRING_STATE.pack(index, 1))
        if fill:
            self.refill()

    def stop(self) -> tuple[int, int]:
        """Stop both queues; returns where they stopped."""
        bases = []
        for index in range(2):
            answer = self.message(Request.GET_VRING_BASE, VRING_STATE.pack(index, 0))
            assert answer is not None
            bases.append(VRING_STATE.unpack_from(answer, HEADER.size)[1])
        return bases[0], bases[1]

    # The driver

    def buffer(self, slot: int) -> int:
        """The address of a receive buffer."""
        return 0x20000 + slot * BUFFER

    def refill(self, count: int | None = None) -> None:
        """Make receive buffers available, as many as fit or `count`."""
        added = 0
        while self.receive.free and (count is None or added < count):
            slot = self.receive.free[-1]
            self.receive.add([(self.buffer(slot), BUFFER)], write=True)
            added += 1
        self.kick(0)

    def kick(self, index: int) -> None:
        """Notify the device, and let it work."""
        if self.kicks:
            os.eventfd_write(self.kicks[index], 1)
        self.settle()

    def interrupts(self, index: int) -> int:
        """How many interrupts came for the queue since the last call."""
        try:
            return os.eventfd_read(self.calls[index])
        except BlockingIOError:
            return 0

    def send_raw(self, data: bytes) -> None:
        """Send the bytes of a packet to the device."""
        address = 0x100000 - 100  # across the border between two regions
        self.transmit.poke(address, data)
        self.transmit.add([(address, len(data))], write=False)
        self.kick(1)
        self.transmit.collect()

    def send(self, op: int, port: int, payload: bytes = b"", **fields: int) -> None:
        """Send a packet from the guest's port 1024 to host port `port`."""
        values = {
            "src_cid": CID,
            "dst_cid": HOST_CID,
            "src_port": PORT,
            "dst_port": port,
            "length": len(payload),
            "type": 1,
            "op": op,
            "flags": 0,
            "buf_alloc": 1 << 18,
            "fwd_cnt": 0,
        } | fields
        self.send_raw(Header(**values).encode() + payload)

    def packets(self) -> list[tuple[Header, bytes]]:
        """What the device has sent to the guest since the last call; buffers are given anew."""
        found = []
        while used := self.receive.collect():
            for head, length in used:
                data = self.receive.peek(self.buffer(head), length)
                header = decode(data)
                assert length == HEADER_SIZE + header.length
                found.append((header, data[HEADER_SIZE:]))
            self.refill()
        return found

    def only(self, op: int) -> Header:
        """The one packet that the device has sent."""
        packets = self.packets()
        assert [header.op for header, _ in packets] == [op], packets
        return packets[0][0]

    # The host

    def dial(self) -> socket.socket:
        """A host client whose stream the guest has been asked for."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.guest_path)
        sock.setblocking(False)
        self.clients.append(sock)
        self.settle()
        return sock

    def open(self, **fields: int) -> tuple[socket.socket, int]:
        """An open stream: the client and the host port."""
        sock = self.dial()
        header = self.only(Op.REQUEST)
        assert (header.src_cid, header.dst_cid, header.dst_port) == (HOST_CID, CID, PORT)
        self.send(Op.RESPONSE, header.src_port, b"", **fields)
        return sock, header.src_port


def recv(sock: socket.socket, count: int = 1 << 20) -> bytes | None:
    """What a client has to read now: b"" at the end, however it came; None if nothing."""
    try:
        return sock.recv(count)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""


def repository() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parents[3]
