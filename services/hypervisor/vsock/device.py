"""The vsock device: vhost-user session, queues and streams on one epoll loop.

Host clients that connect to the guest socket become streams to one guest port. The guest can open
nothing: every connect of its own is answered with RST. All memory is bounded by `Limits` and the
queue sizes; a side that does not read stops only its own stream.
"""

from __future__ import annotations

import array
import contextlib
import functools
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.hypervisor.vsock.connection import Connection, Effect, State, StreamBroke
from services.hypervisor.vsock.errors import BackendPeerBroke, PeerBroke, QueueBroke
from services.hypervisor.vsock.loop import EDGE, HANG_UP, IN, OUT, READ_HANG_UP, Loop
from services.hypervisor.vsock.memory import AddressSpace, GuestMemory, Span
from services.hypervisor.vsock.packet import (
    HEADER_SIZE,
    HOST_CID,
    TYPE_STREAM,
    Header,
    Op,
    decode,
    reset_for,
)
from services.hypervisor.vsock.ring import Chain, Ring
from services.hypervisor.vsock.stream import Stream
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
STREAM_EVENTS = IN | READ_HANG_UP | EDGE
CREDENTIALS = struct.Struct("3i")
"""`struct ucred`: pid, uid, gid."""
FIRST_PORT = 1 << 30
PORTS = 1 << 30
"""Host ports are given out in turn from a range that nothing else uses, so none comes back soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one machine may cost its host. With the defaults at most 28 MiB are held for streams."""

    streams: int = 256
    window: int = 1 << 18
    """Bytes from the guest held per stream; Linux's own default (VIRTIO_VSOCK_DEFAULT_BUF_SIZE)."""
    wide_streams: int = 64
    """How many streams at one time have that window; the rest have the small one."""
    small_window: int = 1 << 16
    resets: int = 256
    """Answers to packets without a stream that are kept for the guest; more are dropped."""
    connect_seconds: float = 10.0
    """From the client's connect to the guest's answer; a client that waits longer is closed."""
    close_seconds: float = 10.0
    """For the guest to confirm an end; Linux gives its peers 8 (VSOCK_CLOSE_TIMEOUT)."""
    retry_first_seconds: float = 0.02
    retry_most_seconds: float = 0.2
    """While the guest has never accepted: it has booted so far as to refuse, its agent has not."""
    turn_bytes: int = 1 << 20
    """How much one direction moves before the other gets its turn."""
    read_bytes: int = 1 << 16
    """How much one stream moves before the next gets its turn."""


class VsockDevice:
    """One guest's vsock device. Owns the sockets it accepts; the listeners belong to the caller."""

    def __init__(
        self,
        loop: Loop,
        *,
        space: AddressSpace,
        machine_pid: int,
        vhost_listener: socket.socket,
        guest_listener: socket.socket,
        guest_cid: int,
        guest_port: int = 1024,
        limits: Limits | None = None,
        log: Callable[[str], None] = lambda message: None,
        on_state: Callable[[str], None] = lambda state: None,
    ) -> None:
        """Start listening; nothing else happens before the machine connects.

        Args:
            loop: Where the device works; it adds itself.
            space: The machine process's memory.
            machine_pid: The only process that may connect to `vhost_listener`.
            vhost_listener: Where QEMU's chardev connects; non-blocking.
            guest_listener: Where host clients connect; non-blocking.
            guest_cid: The guest's address.
            guest_port: The guest port that all streams go to.
            limits: Bounds and time limits.
            log: Called with one line for what an operator should know.
            on_state: Called with `connected`, `running`, `stopped`, `disconnected`.
        """
        self._loop = loop
        self._space = space
        self._machine_pid = machine_pid
        self._vhost_listener = vhost_listener
        self._guest_listener = guest_listener
        self._guest_cid = guest_cid
        self._guest_port = guest_port
        self._limits = limits or Limits()
        self._log = log
        self._on_state = on_state
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
        self._look: list[bool] = [False] * QUEUES
        """The driver may have made something available since the last look."""
        self._streams: dict[int, Stream] = {}
        self._wide = 0
        self._next_port = 0
        self._ready: deque[Stream] = deque()
        self._resets: deque[Header] = deque()
        self._accepted_once = False
        self._running = False
        self._sweep_at: float | None = None
        self._buffer = memoryview(bytearray(max(self._limits.window, self._limits.read_bytes)))
        self.counters = dict.fromkeys(
            ("packets_in", "packets_out", "bytes_in", "bytes_out", "dropped", "streams_broken", "refused"), 0
        )
        loop.add(vhost_listener.fileno(), IN, self._accept_machine)
        loop.add(guest_listener.fileno(), IN, self._accept_clients)
        loop.at_turn_end(self.work)

    @property
    def streams(self) -> int:
        """How many streams there are, those that only wait for an end included."""
        return len(self._streams)

    @property
    def held_bytes(self) -> int:
        """Bytes of the guest that wait for host clients to read."""
        return sum(stream.waiting_bytes for stream in self._streams.values())

    # The machine's side: vhost-user

    def _accept_machine(self, _events: int) -> None:
        try:
            peer, _ = self._vhost_listener.accept()
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
        self._loop.add(peer.fileno(), IN, self._read_machine)
        self._on_state("connected")

    def _read_machine(self, _events: int) -> None:
        try:
            for _ in range(64):
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
                        self._look[index] = True
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
                self._look[index] = True
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
            self._reset_streams()
        self._rings[index] = ring
        self._broken[index] = False
        self._look[index] = True
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
        self._loop.remove(self._vhost.fileno())
        self._close_later(self._vhost)
        self._vhost = self._memory = None
        self._reset_streams()
        self._running = False
        self._on_state("disconnected")

    def _watch_kick(self, index: int, fd: int) -> None:
        self._unwatch_kick(index)
        try:
            # Edges: each kick is an event of its own although the counter is never read.
            self._loop.add(fd, IN | EDGE, lambda _events: self._kicked(index))
        except OSError as error:
            os.close(fd)
            raise BackendPeerBroke(f"queue {index} has a kick that cannot be polled") from error
        self._kick[index] = fd

    def _unwatch_kick(self, index: int) -> None:
        if self._kick[index] >= 0:
            self._loop.close(self._kick[index])
            self._kick[index] = -1

    def _kicked(self, index: int) -> None:
        self._look[index] = True

    def _replace(self, slots: list[int], index: int, fd: int | None) -> None:
        if slots[index] >= 0:
            os.close(slots[index])
        slots[index] = -1 if fd is None else fd
        if fd is not None:
            os.set_blocking(fd, False)

    @staticmethod
    def _close_fds(fds: tuple[int, ...] | array.array[int]) -> None:
        for fd in fds:
            os.close(fd)

    def _close_later(self, sock: socket.socket) -> None:
        self._loop.close(sock.detach())

    # The host's side: clients

    def _accept_clients(self, _events: int) -> None:
        for _ in range(16):
            try:
                sock, _ = self._guest_listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Out of descriptors or memory: the listener stays readable, so look away for a while.
                self._log(f"cannot accept a client: {error.strerror}")
                self._loop.remove(self._guest_listener.fileno())
                self._loop.set_timer("accept", time.monotonic() + 0.1, self._listen_again)
                return
            if len(self._streams) >= self._limits.streams:
                self.counters["refused"] += 1
                sock.close()
                continue
            self._open_stream(sock)

    def _listen_again(self) -> None:
        self._loop.add(self._guest_listener.fileno(), IN, self._accept_clients)

    def _open_stream(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        while FIRST_PORT + self._next_port in self._streams:
            self._next_port = (self._next_port + 1) % PORTS
        port = FIRST_PORT + self._next_port
        self._next_port = (self._next_port + 1) % PORTS
        wide = self._wide < self._limits.wide_streams
        self._wide += wide
        connection = Connection(
            guest_cid=self._guest_cid,
            local_port=port,
            peer_port=self._guest_port,
            window=self._limits.window if wide else self._limits.small_window,
        )
        stream = Stream(connection, sock, self._close_later, wide=wide)
        self._streams[port] = stream
        self._set_deadline(stream, self._limits.connect_seconds)
        self._loop.add(sock.fileno(), STREAM_EVENTS, functools.partial(self._host_event, stream))
        self._wake(stream)

    def _host_event(self, stream: Stream, events: int) -> None:
        if events & OUT:
            stream.flush()
        if events & (IN | READ_HANG_UP):
            stream.mark_readable()
        if events & HANG_UP:
            self._set_deadline(stream, self._limits.close_seconds)
            stream.hang_up()
        self._after(stream)

    def _after(self, stream: Stream) -> None:
        """Something happened to `stream`: watch, send and forget as it now needs."""
        if stream.sock is not None:
            blocked = bool(stream.waiting_bytes)
            if blocked != stream.wants_writable:
                stream.wants_writable = blocked
                self._loop.change(stream.sock.fileno(), STREAM_EVENTS | (OUT if blocked else 0))
        if stream.sock is None and stream.deadline is None:
            self._set_deadline(stream, self._limits.close_seconds)
        if stream.finished:
            self._forget(stream)
        else:
            self._wake(stream)

    def _wake(self, stream: Stream) -> None:
        if not stream.queued and stream.ready:
            stream.queued = True
            self._ready.append(stream)

    def _forget(self, stream: Stream) -> None:
        if self._streams.pop(stream.connection.local_port, None) is not None:
            self._wide -= stream.wide

    def _reset_streams(self) -> None:
        """The guest's driver starts anew: what it knew of is gone, what it has not heard of waits on."""
        self._resets.clear()
        self._accepted_once = False
        for stream in list(self._streams.values()):
            if stream.connection.state in (State.WAITING, State.CONNECTING):
                stream.connection.retry()
                stream.retry_at = None
            else:
                stream.drop()
            self._after(stream)

    # Time limits

    def _set_deadline(self, stream: Stream, seconds: float) -> None:
        stream.deadline = time.monotonic() + seconds
        self._sweep_by(stream.deadline)

    def _sweep_by(self, at: float) -> None:
        if self._sweep_at is None or at < self._sweep_at:
            self._sweep_at = at
            self._loop.set_timer("sweep", at, self._sweep)

    def _sweep(self) -> None:
        now = time.monotonic()
        self._sweep_at = None
        for stream in list(self._streams.values()):
            if stream.deadline is not None and stream.deadline <= now:
                if stream.connection.state is State.CLOSED:
                    stream.drop()
                else:
                    stream.break_off()
                    stream.deadline = now + self._limits.close_seconds
            elif stream.retry_at is not None and stream.retry_at <= now:
                stream.retry_at = None
                stream.connection.retry()
            self._after(stream)
        due = [
            at
            for stream in self._streams.values()
            for at in (stream.deadline, stream.retry_at)
            if at is not None
        ]
        if due:
            self._sweep_by(min(due))

    # The queues

    def work(self) -> bool:
        """Move what can be moved now; True if some of it was left for the next turn.

        Raises:
            MachineGone: the machine's memory cannot be reached.
        """
        left = self._take_packets()
        return self._give_packets() or left

    def _live(self, index: int) -> Ring | None:
        ring = self._rings[index]
        return ring if self._enabled[index] and not self._broken[index] else None

    def _break_queue(self, index: int, error: PeerBroke) -> None:
        """Leave the queue alone until the driver has reset it, and tell QEMU."""
        self._log(f"the guest broke queue {index}: {error}")
        self._broken[index] = True
        self._signal(self._error[index])
        self._reset_streams()

    def _publish(self, index: int, ring: Ring) -> None:
        if ring.publish():
            self._signal(self._call[index])

    @staticmethod
    def _signal(fd: int) -> None:
        if fd >= 0:
            with contextlib.suppress(OSError):  # the counter is full: it is signalled already
                os.write(fd, SIGNAL)

    # From the guest

    def _take_packets(self) -> bool:
        ring = self._live(TRANSMIT)
        if ring is None or not (self._look[TRANSMIT] or ring.pending):
            return False
        self._look[TRANSMIT] = False
        budget = self._limits.turn_bytes
        try:
            ring.fetch()
            while ring.pending and budget > 0:
                chain = ring.pending.popleft()
                budget -= HEADER_SIZE + self._take_packet(chain)
                ring.complete(chain, 0)
                if not ring.pending or budget <= 0 or ring.unpublished >= 32:
                    self._publish(TRANSMIT, ring)
        except QueueBroke as error:
            self._break_queue(TRANSMIT, error)
            return False
        return bool(ring.pending)

    def _take_packet(self, chain: Chain) -> int:
        """Act on one packet; returns how many bytes of payload were taken."""
        self.counters["packets_in"] += 1
        if chain.length < HEADER_SIZE:
            self.counters["dropped"] += 1
            return 0
        first, rest = self._read_header(chain.spans)
        header = decode(first)
        if header.src_cid != self._guest_cid:
            self.counters["dropped"] += 1
            return 0
        stream = self._streams.get(header.dst_port)
        if (
            stream is None
            or header.dst_cid != HOST_CID
            or header.type != TYPE_STREAM
            or header.src_port != self._guest_port
        ):
            self._answer_reset(header)
            return 0
        if header.op == Op.RW and header.length > chain.length - HEADER_SIZE:
            self._break_stream(stream, "a payload longer than its buffer")
            return 0
        try:
            effect = stream.connection.receive(header)
        except StreamBroke as error:
            self._break_stream(stream, str(error))
            return 0
        taken = 0
        if effect & Effect.DATA:
            taken = header.length
            self.counters["bytes_in"] += taken
            stream.deliver(self._read_payload(first, rest, taken))
        elif effect:
            self._react(stream, effect)
        self._after(stream)
        return taken

    def _react(self, stream: Stream, effect: Effect) -> None:
        if effect & Effect.OPENED:
            self._accepted_once = True
            stream.deadline = None
            if stream.hung_up:
                self._set_deadline(stream, self._limits.close_seconds)
        if effect & Effect.NO_MORE_WANTED:
            stream.stop_reading()
        if effect & Effect.NO_MORE_DATA:
            stream.end_after_data()
        if effect & Effect.GONE:
            stream.close_after_data()
        if effect & Effect.REFUSED:
            if self._accepted_once:
                stream.drop()
                return
            stream.retry_seconds = min(
                max(2 * stream.retry_seconds, self._limits.retry_first_seconds),
                self._limits.retry_most_seconds,
            )
            stream.retry_at = time.monotonic() + stream.retry_seconds
            self._sweep_by(stream.retry_at)

    def _break_stream(self, stream: Stream, reason: str) -> None:
        self._log(f"the guest broke stream {stream.connection.local_port}: {reason}")
        self.counters["streams_broken"] += 1
        stream.break_off()
        self._after(stream)

    def _answer_reset(self, header: Header) -> None:
        reset = reset_for(header)
        if reset is not None and len(self._resets) < self._limits.resets:
            self._resets.append(reset)
        else:
            self.counters["dropped"] += 1

    def _read_header(self, spans: tuple[Span, ...]) -> tuple[bytes, Iterator[Span]]:
        """The packet's first bytes, at least a header, and where the rest of it is."""
        rest = iter(spans)
        address, length = next(rest)
        # A small packet in one piece needs one read; 4 KiB is what a page-sized buffer holds.
        first = self._space.read(address, length if length <= 4096 else HEADER_SIZE)
        if length > len(first):
            rest = iter(((address + len(first), length - len(first)), *rest))
        while len(first) < HEADER_SIZE:
            address, length = next(rest)
            step = min(length, HEADER_SIZE - len(first))
            first += self._space.read(address, step)
            if step < length:
                rest = iter(((address + step, length - step), *rest))
        return first, rest

    def _read_payload(self, first: bytes, rest: Iterator[Span], length: int) -> memoryview:
        """`length` bytes after the header; they are overwritten by the next read."""
        early = memoryview(first)[HEADER_SIZE : HEADER_SIZE + length]
        if len(early) == length:
            return early
        position = len(early)
        self._buffer[:position] = early
        while position < length:
            address, size = next(rest)
            step = min(size, length - position)
            self._space.read_into(address, [self._buffer[position : position + step]])
            position += step
        return self._buffer[:length]

    # To the guest

    def _give_packets(self) -> bool:
        ring = self._live(RECEIVE)
        if ring is None:
            return False
        budget = self._limits.turn_bytes
        try:
            while (self._ready or self._resets) and budget > 0:
                if not ring.pending and not self._find_buffers(ring):
                    break
                if self._resets:
                    self._put(ring, self._resets.popleft().encode(), None)
                else:
                    stream = self._ready.popleft()
                    stream.queued = False
                    budget -= HEADER_SIZE + self._serve(ring, stream)
                if ring.unpublished >= 16:
                    self._publish(RECEIVE, ring)
            self._publish(RECEIVE, ring)
        except QueueBroke as error:
            self._break_queue(RECEIVE, error)
            return False
        return bool(ring.pending and (self._ready or self._resets))

    def _find_buffers(self, ring: Ring) -> bool:
        if ring.unpublished:
            self._publish(RECEIVE, ring)
        if ring.pending or ring.fetch():
            return True
        # None left: only now a kick is worth the guest's while.
        ring.want_notifications(True)
        if not ring.fetch():
            return False
        ring.want_notifications(False)
        return True

    def _serve(self, ring: Ring, stream: Stream) -> int:
        """Send what one stream has to say, a bounded part of it; returns the payload's size."""
        connection = stream.connection
        while ring.pending and (control := connection.next_control()) is not None:
            self._put(ring, control, None)
        sent = 0
        if ring.pending and stream.readable and connection.state is State.OPEN:
            sent = self._send_data(ring, stream)
        self._after(stream)
        return sent

    def _send_data(self, ring: Ring, stream: Stream) -> int:
        connection = stream.connection
        credit = connection.credit
        if not credit:
            request = connection.credit_request()
            if request is not None:
                self._put(ring, request, None)
            return 0
        room, limit = 0, min(credit, self._limits.read_bytes)
        for chain in ring.pending:
            if chain.length <= HEADER_SIZE:
                raise QueueBroke(f"a receive buffer of {chain.length} bytes")
            room += chain.length - HEADER_SIZE
            if room >= limit:
                break
        count = stream.read_into(self._buffer[: min(room, limit)])
        position = 0
        while position < count:
            step = min(count - position, ring.pending[0].length - HEADER_SIZE)
            self._put(ring, connection.data(step), self._buffer[position : position + step])
            position += step
        self.counters["bytes_out"] += count
        if count and stream.hung_up:
            self._set_deadline(stream, self._limits.close_seconds)
        return count

    def _put(self, ring: Ring, header: bytes, payload: memoryview | None) -> None:
        """Fill the next receive buffer; the caller has made sure that there is one."""
        chain = ring.pending.popleft()
        size = HEADER_SIZE + (len(payload) if payload is not None else 0)
        if chain.length < size:
            raise QueueBroke(f"a receive buffer of {chain.length} bytes")
        address, length = chain.spans[0]
        if length >= size:
            self._space.write(address, [header] if payload is None else [header, payload])
        else:
            self._scatter(chain.spans, memoryview(header), payload)
        ring.complete(chain, size)
        self.counters["packets_out"] += 1

    def _scatter(self, spans: tuple[Span, ...], header: memoryview, payload: memoryview | None) -> None:
        pieces = [header] if payload is None else [header, payload]
        for address, length in spans:
            here: list[memoryview] = []
            while pieces and length:
                piece = pieces[0][:length]
                here.append(piece)
                length -= len(piece)
                if len(piece) == len(pieces[0]):
                    pieces.pop(0)
                else:
                    pieces[0] = pieces[0][len(piece) :]
            if here:
                self._space.write(address, here)
            if not pieces:
                return


def _at_end(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
