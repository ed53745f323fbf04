"""The vsock device as one function of bytes: a machine, a guest and host clients that obey nothing.

Invariant: whatever the bytes say, the device never touches what is not guest memory, never holds more
than its bounds, comes to rest when nothing more is said to it, and afterwards serves a machine that
behaves. A violation is an exception.

The bytes are a list of steps: a kind, then what that kind takes. Reading past the end gives zeros.
"""

from __future__ import annotations

import contextlib
import os
import socket

from services.hypervisor.vsock.device import Limits
from services.hypervisor.vsock.packet import HOST_CID, Header, Op
from services.hypervisor.vsock.vhost_user import HEADER, U64, VERSION, VRING_STATE, Request
from tests.unit.hypervisor.vsock_rig import CID, PORT, Rig, recv

LIMITS = Limits(
    streams=6,
    window=1 << 13,
    wide_streams=2,
    small_window=1 << 11,
    resets=8,
    connect_seconds=30,
    close_seconds=30,
    turn_bytes=1 << 14,
    read_bytes=1 << 12,
)
QUEUE = 16
MAX_STEPS = 120

(
    STEP_PACKET,
    STEP_RAW_PACKET,
    STEP_POKE,
    STEP_DESCRIBE,
    STEP_OFFER,
    STEP_KICK,
    STEP_MESSAGE,
    STEP_RAW_MESSAGE,
    STEP_DIAL,
    STEP_CLIENT,
    STEP_COLLECT,
    STEP_RESET,
    STEP_PAUSE,
    STEP_REPLUG,
    KINDS,
) = range(15)


class Steps:
    """The bytes, taken from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece.ljust(count, b"\0")

    def number(self, size: int = 1) -> int:
        """The next `size` bytes as a number."""
        return int.from_bytes(self.take(size), "little")


def run(data: bytes) -> None:
    """Do what `data` says, check the bounds after each step, then see that the device still serves."""
    steps = Steps(data)
    with Rig(LIMITS, queue_size=QUEUE) as rig:
        rig.plug()
        rig.start()
        for _ in range(MAX_STEPS):
            if not steps:
                break
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                step(rig, steps)
            check(rig)
        serves(rig)


def step(rig: Rig, steps: Steps) -> None:
    """One step."""
    kind = steps.number() % KINDS
    if rig.machine is None:
        kind = STEP_REPLUG
    if kind == STEP_PACKET:
        packet(rig, steps)
    elif kind == STEP_RAW_PACKET:
        transmit(rig, steps.take(steps.number() % 128))
    elif kind == STEP_POKE:
        queue = (rig.receive, rig.transmit)[steps.number() % 2]
        where = (queue.descriptors, queue.available, queue.used)[steps.number() % 3]
        rig.receive.poke(where + steps.number(2) % 256, steps.take(steps.number() % 32))
    elif kind == STEP_DESCRIBE:
        queue = (rig.receive, rig.transmit)[steps.number() % 2]
        queue.describe(
            steps.number() % QUEUE, steps.number(8), steps.number(4), steps.number(2), steps.number(2)
        )
    elif kind == STEP_OFFER:
        queue = (rig.receive, rig.transmit)[steps.number() % 2]
        queue.offer(steps.number(2), index=steps.number(2) if steps.number() % 4 == 0 else None)
        rig.kick(0)
        rig.kick(1)
    elif kind == STEP_KICK:
        rig.kick(steps.number() % 2)
    elif kind == STEP_MESSAGE:
        requests = list(Request)
        request = requests[steps.number() % len(requests)]
        body = steps.take((0, 8, 12, 20, 40, 72, 104)[steps.number() % 7])
        rig.message(request, body, [rig.memory] * (steps.number() % 4), flags=VERSION | steps.number() % 16)
    elif kind == STEP_RAW_MESSAGE:
        rig.raw(steps.take(1 + steps.number() % 64), [rig.memory] * (steps.number() % 10))
    elif kind == STEP_DIAL:
        rig.dial()
    elif kind == STEP_CLIENT:
        client(rig, steps)
    elif kind == STEP_COLLECT:
        collect(rig)
    elif kind == STEP_RESET:
        rig.stop()
        rig.reset_driver()
        rig.start()
    elif kind == STEP_PAUSE:
        for index in range(2):
            answer = rig.message(Request.GET_VRING_BASE, VRING_STATE.pack(index, 0))
            assert answer is None or len(answer) == HEADER.size + VRING_STATE.size
        for index in range(2):
            rig.message(Request.SET_VRING_KICK, U64.pack(index), [rig.kicks[index]])
            rig.message(Request.SET_VRING_ENABLE, VRING_STATE.pack(index, 1))
    else:
        rig.unplug()
        rig.reset_driver()
        rig.plug()
        rig.start()


def ports(rig: Rig) -> list[int]:
    """The streams there are, and one there is not."""
    return [*rig.device._streams, 77]


def packet(rig: Rig, steps: Steps) -> None:
    """A packet of a stream, more or less well formed."""
    known = ports(rig)
    payload = steps.take(steps.number(2) % 3000)
    choice = steps.number()
    header = Header(
        src_cid=CID if choice & 1 == 0 else steps.number(8),
        dst_cid=HOST_CID if choice & 2 == 0 else steps.number(8),
        src_port=PORT if choice & 4 == 0 else steps.number(4),
        dst_port=known[steps.number() % len(known)],
        length=len(payload) if choice & 8 == 0 else steps.number(4),
        type=1 if choice & 16 == 0 else steps.number(2),
        op=steps.number() % 9,
        flags=steps.number() % 5,
        buf_alloc=1 << 16 if choice & 32 == 0 else steps.number(4),
        fwd_cnt=0 if choice & 64 == 0 else steps.number(4),
    )
    transmit(rig, header.encode() + payload)


def transmit(rig: Rig, data: bytes) -> None:
    """Offer `data` as a packet, if the driver has a descriptor left."""
    rig.transmit.collect()
    if rig.transmit.free and data:
        rig.send_raw(data)


def client(rig: Rig, steps: Steps) -> None:
    """Something a host client may do."""
    if not rig.clients:
        return
    sock = rig.clients[steps.number() % len(rig.clients)]
    action = steps.number() % 5
    with contextlib.suppress(OSError):
        if action == 0:
            sock.send(bytes(steps.number(2) % 9000))
        elif action == 1:
            recv(sock, 1 + steps.number(2))
        elif action == 2:
            sock.shutdown(steps.number() % 3)
        elif action == 3:
            sock.close()
        else:
            sock.send(steps.take(8))
    rig.settle()


def collect(rig: Rig) -> None:
    """Take what the device has sent, whatever state the queue is in, and give buffers again."""
    rig.receive.collect()
    if len(rig.receive.free) <= QUEUE:
        rig.refill()


def check(rig: Rig) -> None:
    """The bounds. (Memory accesses are checked by the rig's memory itself.)"""
    device = rig.device
    assert device.streams <= LIMITS.streams
    assert len(device._resets) <= LIMITS.resets
    assert device.held_bytes <= LIMITS.streams * LIMITS.window
    for stream in device._streams.values():
        assert stream.waiting_bytes <= stream.connection.window
        assert 0 <= stream.connection.held <= stream.connection.window
        assert stream.connection.held == stream.waiting_bytes
    assert len(device._ready) <= LIMITS.streams + 1
    for ring in device._session._rings:
        if ring is not None:
            held = sum(chain.descriptors for chain in ring.pending)
            assert held <= ring._size
            assert len(ring.pending) <= ring._size
    assert len(os.listdir("/proc/self/fd")) < 400


def serves(rig: Rig) -> None:
    """A machine and a guest that behave are served after all that."""
    for sock in rig.clients:
        sock.close()
    rig.clients.clear()
    rig.unplug()
    rig.reset_driver()
    rig.plug()
    rig.start()
    assert rig.states[-1] == "running"
    rig.packets()
    # What waited for the guest before has either been asked for or has ended; end the rest.
    for port in list(rig.device._streams):
        rig.send(Op.RST, port)
        rig.packets()
    for stream in list(rig.device._streams.values()):
        stream.drop()
        rig.device._after(stream)
    sock, port = rig.open()
    sock.sendall(b"ping")
    rig.settle()
    assert [payload for header, payload in rig.packets() if header.op == Op.RW] == [b"ping"]
    rig.send(Op.RW, port, b"pong")
    assert recv(sock) == b"pong"
    sock.shutdown(socket.SHUT_RDWR)
