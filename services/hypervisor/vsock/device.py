"""The vsock device: packets of a machine's queues become streams of host clients, on an epoll loop.

Host clients that connect to the guest socket become streams to one guest port. The guest can open
nothing: every connect of its own is answered with RST. All memory is bounded by `Limits` and the
queue sizes; a side that does not read stops only its own stream.
"""

from __future__ import annotations

import functools
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.hypervisor.vsock.connection import Connection, Effect, State, StreamBroke
from services.hypervisor.vsock.errors import QueueBroke
from services.hypervisor.vsock.loop import EDGE, HANG_UP, IN, OUT, READ_HANG_UP, Loop
from services.hypervisor.vsock.memory import AddressSpace, Span
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
from services.hypervisor.vsock.session import RECEIVE, TRANSMIT, VhostSession
from services.hypervisor.vsock.stream import Stream

STREAM_EVENTS = IN | READ_HANG_UP | EDGE
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
        self._guest_listener = guest_listener
        self._guest_cid = guest_cid
        self._guest_port = guest_port
        self._limits = limits or Limits()
        self._log = log
        self._streams: dict[int, Stream] = {}
        self._wide = 0
        self._next_port = 0
        self._ready: deque[Stream] = deque()
        self._resets: deque[Header] = deque()
        self._accepted_once = False
        self._sweep_at: float | None = None
        self._buffer = memoryview(bytearray(max(self._limits.window, self._limits.read_bytes)))
        self.counters = dict.fromkeys(
            ("packets_in", "packets_out", "bytes_in", "bytes_out", "dropped", "streams_broken", "refused"), 0
        )
        self._session = VhostSession(
            loop,
            space=space,
            machine_pid=machine_pid,
            listener=vhost_listener,
            guest_cid=guest_cid,
            on_reset=self._reset_streams,
            on_state=on_state,
            log=log,
        )
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
        stream = Stream(connection, sock, lambda done: self._loop.close(done.detach()), wide=wide)
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

    # From the guest

    def _take_packets(self) -> bool:
        ring = self._session.ring(TRANSMIT)
        if ring is None or not (self._session.look[TRANSMIT] or ring.pending):
            return False
        self._session.look[TRANSMIT] = False
        budget = self._limits.turn_bytes
        try:
            ring.fetch()
            while ring.pending and budget > 0:
                chain = ring.pending.popleft()
                budget -= HEADER_SIZE + self._take_packet(chain)
                ring.complete(chain, 0)
                if not ring.pending or budget <= 0 or ring.unpublished >= 32:
                    self._session.publish(TRANSMIT, ring)
        except QueueBroke as error:
            self._session.break_queue(TRANSMIT, error)
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
        ring = self._session.ring(RECEIVE)
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
                    self._session.publish(RECEIVE, ring)
            self._session.publish(RECEIVE, ring)
        except QueueBroke as error:
            self._session.break_queue(RECEIVE, error)
            return False
        return bool(ring.pending and (self._ready or self._resets))

    def _find_buffers(self, ring: Ring) -> bool:
        if ring.unpublished:
            self._session.publish(RECEIVE, ring)
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
