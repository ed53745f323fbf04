"""The machine's side of the device: its vhost-user connection and its queues, on an epoll loop.

One machine is connected at a time; it may go and come again (unplug and plug). What it breaks costs
its own connection, what its guest breaks costs the queue until the driver resets it.
"""

from __future__ import annotations

import array
import contextlib
import functools
import os
import socket
import struct
from collections.abc import Callable, Iterable

from services.hypervisor.vsock.errors import BackendPeerBroke, QueueBroke
from services.hypervisor.vsock.loop import EDGE, IN, Loop
from services.hypervisor.vsock.memory import AddressSpace, GuestMemory
from services.hypervisor.vsock.ring import Ring
from services.hypervisor.vsock.vhost_user import (
    MAX_REGIONS,
    QUEUES,
    Backend,
    Discard,
    Event,
    MemoryTable,
    Reply,
    RingCall,
    RingEnable,
    RingError,
    RingKick,
    RingLayout,
    RingStart,
    RingStop,
)

RECEIVE, TRANSMIT = 0, 1
"""Queue numbers, named as the guest's driver sees them (virtio 1.2, 5.10.2)."""

SIGNAL = struct.pack("=Q", 1)
CREDENTIALS = struct.Struct("3i")
"""`struct ucred`: pid, uid, gid."""
MESSAGES_PER_TURN = 64


class VhostSession:
    """Owns the connections it accepts and every descriptor that comes through them."""

    def __init__(
        self,
        loop: Loop,
        *,
        space: AddressSpace,
        machine_pid: int,
        listener: socket.socket,
        guest_cid: int,
        on_reset: Callable[[], None],
        on_state: Callable[[str], None],
        log: Callable[[str], None],
    ) -> None:
        """Start listening.

        Args:
            loop: Where the session works.
            space: The machine process's memory.
            machine_pid: The only process that may connect.
            listener: Where QEMU's chardev connects; non-blocking; the caller's.
            guest_cid: What the guest reads as its address.
            on_reset: Called when the guest's driver has started anew, or is gone: it has forgotten
                every stream.
            on_state: Called with `connected`, `running`, `stopped`, `disconnected`.
            log: Called with one line for what an operator should know.
        """
        self._loop = loop
        self._space = space
        self._machine_pid = machine_pid
        self._listener = listener
        self._guest_cid = guest_cid
        self._on_reset = on_reset
        self._on_state = on_state
        self._log = log
        self._vhost: socket.socket | None = None
        self._backend = Backend(guest_cid)
        self._memory: GuestMemory | None = None
        self._rings: list[Ring | None] = [None] * QUEUES
        self._parked: list[Ring | None] = [None] * QUEUES
        self._enabled = [False] * QUEUES
        self._broken = [False] * QUEUES
        self._kick = [-1] * QUEUES
        self._call = [-1] * QUEUES
        self._error = [-1] * QUEUES
        self._running = False
        self.look = [True] * QUEUES
        """The driver may have made something available since this was set to False."""
        loop.add(listener.fileno(), IN, self._accept)

    # The queues

    def ring(self, index: int) -> Ring | None:
        """The queue, if it may be used now."""
        ring = self._rings[index]
        return ring if self._enabled[index] and not self._broken[index] else None

    def break_queue(self, index: int, error: QueueBroke) -> None:
        """Leave the queue alone until the driver has reset it, and tell QEMU."""
        self._log(f"the guest broke queue {index}: {error}")
        self._broken[index] = True
        self._signal(self._error[index])
        self._on_reset()

    def publish(self, index: int, ring: Ring) -> None:
        """Show the driver what was completed in `ring`, and interrupt it if it wants that.

        Raises:
            QueueBroke: as `Ring.publish`.
        """
        if ring.publish():
            self._signal(self._call[index])

    @staticmethod
    def _signal(fd: int) -> None:
        if fd >= 0:
            with contextlib.suppress(OSError):  # the counter is full: it is signalled already
                os.write(fd, SIGNAL)

    # The connection

    def _accept(self, _events: int) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            return
        raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        pid, _uid, _gid = CREDENTIALS.unpack(raw)
        if self._vhost is not None and _at_end(self._vhost):
            self._disconnect()  # replaced: its end just has not been read yet
        if pid != self._machine_pid or self._vhost is not None:
            self._log(f"refused a vhost-user connection from process {pid}")
            peer.close()
            return
        peer.setblocking(False)
        self._vhost = peer
        self._backend = Backend(self._guest_cid)
        self._loop.add(peer.fileno(), IN, self._read)
        self._on_state("connected")

    def _read(self, _events: int) -> None:
        try:
            for _ in range(MESSAGES_PER_TURN):
                if self._vhost is None or not self._read_message(self._vhost):
                    return
        except BackendPeerBroke as error:
            self._log(f"the machine broke the vhost-user protocol: {error}")
            self._close_fds(self._backend.undelivered)
            self._disconnect()

    def _read_message(self, vhost: socket.socket) -> bool:
        """Read one part of a message and act on what it completes; False if there is none now."""
        try:
            data, ancillary, flags, _ = vhost.recvmsg(
                self._backend.wanted, socket.CMSG_SPACE(MAX_REGIONS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        except OSError:
            data, ancillary, flags = b"", [], 0
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if not data:
            self._close_fds(fds)
            self._disconnect()
            return False
        if flags & socket.MSG_CTRUNC:
            self._close_fds(fds)
            raise BackendPeerBroke("more descriptors than a message can carry")
        for event in self._backend.receive(data, fds):
            self._apply(vhost, event)
        return True

    def _apply(self, vhost: socket.socket, event: Event) -> None:
        match event:
            case Reply(data):
                self._reply(vhost, data)
            case Discard(fds):
                self._close_fds(fds)
            case MemoryTable(regions):
                self._memory = GuestMemory(self._space, regions)
                for index, ring in enumerate(self._rings):
                    if ring is not None:
                        self._rings[index] = Ring(ring.layout, self._memory, writable=index == RECEIVE)
                        self.look[index] = True
            case RingStart(index, layout, kick):
                self._watch_kick(index, kick)
                self._start_ring(index, layout)
            case RingKick(index, kick):
                self._watch_kick(index, kick)
            case RingCall(index, fd):
                self._replace(self._call, index, fd)
            case RingError(index, fd):
                self._replace(self._error, index, fd)
            case RingEnable(index, enabled):
                self._enabled[index] = enabled
                self.look[index] = True
            case RingStop(index):
                ring = self._rings[index]
                assert ring is not None
                self._reply(vhost, self._backend.base_reply(index, ring.position))
                self._stop_ring(index)
        running = all(ring is not None for ring in self._rings) and all(self._enabled)
        if running != self._running:
            self._running = running
            self._on_state("running" if running else "stopped")

    def _reply(self, vhost: socket.socket, data: bytes) -> None:
        try:
            done = vhost.send(data)
        except OSError:
            done = 0
        if done != len(data):
            raise BackendPeerBroke("the machine does not read its replies")

    def _start_ring(self, index: int, layout: RingLayout) -> None:
        if self._memory is None:
            raise BackendPeerBroke("a queue was started before the memory was known")
        ring = Ring(layout, self._memory, writable=index == RECEIVE)
        parked, self._parked[index] = self._parked[index], None
        # A paused machine restarts its queues where they were; a driver that was reset does not.
        if parked is None or self._broken[index] or not parked.same_place(layout):
            self._on_reset()
        self._rings[index] = ring
        self._broken[index] = False
        self.look[index] = True
        if index == RECEIVE:
            ring.want_notifications(False)

    def _stop_ring(self, index: int) -> None:
        self._parked[index], self._rings[index] = self._rings[index], None
        self._enabled[index] = False
        self._unwatch_kick(index)

    def _disconnect(self) -> None:
        """Forget the machine's device, and every stream that went through it."""
        if self._vhost is None:
            return
        for index in range(QUEUES):
            self._stop_ring(index)
            self._parked[index] = None
            self._replace(self._call, index, None)
            self._replace(self._error, index, None)
        self._loop.close(self._vhost.detach())
        self._vhost = self._memory = None
        self._on_reset()
        self._running = False
        self._on_state("disconnected")

    def _watch_kick(self, index: int, fd: int) -> None:
        self._unwatch_kick(index)
        try:
            # Edges: each kick is an event of its own although the counter is never read.
            self._loop.add(fd, IN | EDGE, functools.partial(self._kicked, index))
        except OSError as error:
            os.close(fd)
            raise BackendPeerBroke(f"queue {index} has a kick that cannot be polled") from error
        self._kick[index] = fd

    def _unwatch_kick(self, index: int) -> None:
        if self._kick[index] >= 0:
            self._loop.close(self._kick[index])
            self._kick[index] = -1

    def _kicked(self, index: int, _events: int) -> None:
        self.look[index] = True

    def _replace(self, slots: list[int], index: int, fd: int | None) -> None:
        if slots[index] >= 0:
            os.close(slots[index])
        slots[index] = -1 if fd is None else fd
        if fd is not None:
            os.set_blocking(fd, False)

    @staticmethod
    def _close_fds(fds: Iterable[int]) -> None:
        for fd in fds:
            os.close(fd)


def _at_end(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
