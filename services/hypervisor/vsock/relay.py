"""For hosts whose kernel serves the guest's vsock: a byte relay from the guest socket to AF_VSOCK.

The machine then has a `vhost-vsock-pci` device, and packets never pass through this process. Both
directions of a stream are bounded by one buffer each, and each stops when its reader stops.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import time
from collections.abc import Callable

from services.hypervisor.vsock.loop import EDGE, HANG_UP, IN, OUT, READ_HANG_UP, Loop

EVENTS = IN | OUT | READ_HANG_UP | EDGE
BUFFER = 1 << 16
TURN_BYTES = 1 << 18
"""How much one stream moves before the others get their turn."""

# What a guest that is still starting answers: no driver yet, or nothing listens yet.
NOT_YET = frozenset({errno.ECONNRESET, errno.ECONNREFUSED, errno.ENODEV, errno.EHOSTUNREACH})

Dial = Callable[[], socket.socket]
"""A new non-blocking socket that is connecting; raises OSError if it cannot."""


def vsock_dialer(guest_cid: int, guest_port: int = 1024) -> Dial:
    """Connects to the guest through the kernel (`/dev/vhost-vsock` serves it)."""

    def dial() -> socket.socket:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect((guest_cid, guest_port))
        except BaseException:
            sock.close()
            raise
        return sock

    return dial


class _Flow:
    """One direction: what was read from `source` and not yet written to `sink`."""

    __slots__ = ("_pending", "_view", "at_end", "done", "readable", "sink", "source", "writable")

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.readable = True
        self.writable = True
        self.at_end = False
        self.done = False
        self._pending = memoryview(b"")

    def move(self, budget: int) -> int:
        """Move at most `budget` bytes; returns how many. Once `done`, the sink has seen the end.

        Raises:
            OSError: a side broke off.
        """
        moved = 0
        while moved < budget and not self.done:
            if not self._pending and not self.at_end:
                if not self.readable:
                    break
                try:
                    data = self.source.recv(BUFFER)
                except BlockingIOError:
                    self.readable = False
                    break
                self._pending = memoryview(data)
                self.at_end = not data
            if self._pending:
                if not self.writable:
                    break
                try:
                    count = self.sink.send(self._pending)
                except BlockingIOError:
                    self.writable = False
                    break
                self._pending = self._pending[count:]
                moved += count
            if self.at_end and not self._pending:
                self.done = True
                with contextlib.suppress(OSError):
                    self.sink.shutdown(socket.SHUT_WR)
        return moved

    @property
    def can_move(self) -> bool:
        """Whether `move` would get further now."""
        if self.done:
            return False
        return self.writable if self._pending or self.at_end else self.readable


class _Pair:
    """A client and its stream to the guest."""

    __slots__ = ("client", "connected", "deadline", "flows", "guest", "retry_at", "retry_seconds")

    def __init__(self, client: socket.socket, deadline: float) -> None:
        self.client = client
        self.guest: socket.socket | None = None
        self.connected = False
        self.deadline = deadline
        self.retry_at: float | None = None
        self.retry_seconds = 0.02
        self.flows: tuple[_Flow, _Flow] | None = None


class VsockRelay:
    """Relays each client of the guest socket to a stream of its own. The listener is the caller's."""

    def __init__(
        self,
        loop: Loop,
        *,
        guest_listener: socket.socket,
        dial: Dial,
        streams: int = 256,
        connect_seconds: float = 10.0,
        log: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Start listening.

        Args:
            loop: Where the relay works.
            guest_listener: Where host clients connect; non-blocking.
            dial: Opens the guest's end.
            streams: How many clients are served at one time; more are closed at once.
            connect_seconds: How long a client waits for a guest that is still starting.
            log: Called with one line for what an operator should know.
        """
        self._loop = loop
        self._listener = guest_listener
        self._dial = dial
        self._limit = streams
        self._connect_seconds = connect_seconds
        self._log = log
        self._pairs: set[_Pair] = set()
        self._accepted_once = False
        self._sweep_at: float | None = None
        self.refused = 0
        loop.add(guest_listener.fileno(), IN, self._accept)
        loop.at_turn_end(self.work)

    @property
    def streams(self) -> int:
        """How many clients are being served."""
        return len(self._pairs)

    def _accept(self, _events: int) -> None:
        for _ in range(16):
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._log(f"cannot accept a client: {error.strerror}")
                self._loop.remove(self._listener.fileno())
                self._loop.set_timer("accept", time.monotonic() + 0.1, self._listen_again)
                return
            if len(self._pairs) >= self._limit:
                self.refused += 1
                client.close()
                continue
            client.setblocking(False)
            pair = _Pair(client, time.monotonic() + self._connect_seconds)
            self._pairs.add(pair)
            self._loop.add(client.fileno(), EVENTS, functools.partial(self._client_event, pair))
            self._try(pair)

    def _listen_again(self) -> None:
        self._loop.add(self._listener.fileno(), IN, self._accept)

    def _try(self, pair: _Pair) -> None:
        pair.retry_at = None
        try:
            pair.guest = self._dial()
        except OSError as error:
            self._failed(pair, error.errno or 0)
            return
        self._loop.add(pair.guest.fileno(), EVENTS, functools.partial(self._guest_event, pair))
        self._sweep_by(pair.deadline)

    def _failed(self, pair: _Pair, code: int) -> None:
        """The guest did not take the stream: again later while it has never taken any."""
        if pair.guest is not None:
            self._loop.close(pair.guest.detach())
            pair.guest = None
        if code not in NOT_YET or self._accepted_once:
            self._close(pair)
            return
        pair.retry_at = time.monotonic() + pair.retry_seconds
        pair.retry_seconds = min(2 * pair.retry_seconds, 0.2)
        self._sweep_by(pair.retry_at)

    def _client_event(self, pair: _Pair, events: int) -> None:
        if pair.flows is not None:
            to_guest, to_client = pair.flows
            to_guest.readable |= bool(events & (IN | READ_HANG_UP | HANG_UP))
            to_client.writable |= bool(events & (OUT | HANG_UP))
        elif events & HANG_UP and not _has_unread(pair.client):
            self._close(pair)

    def _guest_event(self, pair: _Pair, events: int) -> None:
        if pair.guest is None:
            return
        if pair.flows is None:
            code = pair.guest.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self._failed(pair, code)
            elif events & OUT:
                self._accepted_once = True
                pair.flows = (_Flow(pair.client, pair.guest), _Flow(pair.guest, pair.client))
            return
        to_guest, to_client = pair.flows
        to_client.readable |= bool(events & (IN | READ_HANG_UP | HANG_UP))
        to_guest.writable |= bool(events & (OUT | HANG_UP))

    def work(self) -> bool:
        """Move what can be moved now; True if some of it was left for the next turn."""
        left = False
        for pair in list(self._pairs):
            if pair.flows is None:
                continue
            try:
                for flow in pair.flows:
                    if flow.can_move:
                        flow.move(TURN_BYTES)
                        left |= flow.can_move
            except OSError:
                self._close(pair)
                continue
            if all(flow.done for flow in pair.flows):
                self._close(pair)
        return left

    def _sweep_by(self, at: float) -> None:
        if self._sweep_at is None or at < self._sweep_at:
            self._sweep_at = at
            self._loop.set_timer("sweep", at, self._sweep)

    def _sweep(self) -> None:
        now = time.monotonic()
        self._sweep_at = None
        for pair in list(self._pairs):
            if pair.flows is not None:
                continue
            if pair.deadline <= now:
                self._close(pair)
            elif pair.retry_at is not None and pair.retry_at <= now:
                self._try(pair)
        waiting = [pair for pair in self._pairs if pair.flows is None]
        if waiting:
            self._sweep_by(min(min(pair.deadline, pair.retry_at or pair.deadline) for pair in waiting))

    def _close(self, pair: _Pair) -> None:
        if pair not in self._pairs:
            return
        self._pairs.discard(pair)
        self._loop.close(pair.client.detach())
        if pair.guest is not None:
            self._loop.close(pair.guest.detach())
            pair.guest = None


def _has_unread(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return False
