"""The host's end of one stream: a non-blocking unix socket and what could not be written to it yet."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from services.hypervisor.vsock.connection import Connection, State
from services.hypervisor.vsock.packet import SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND

WRITE_STEP = 1 << 17


class Stream:
    """A `Connection` and the host's socket for it.

    The socket is watched for edges: `readable` stays true until a read found nothing. Every method
    leaves the pair consistent whatever the host's client does; a client's error ends the stream.
    """

    __slots__ = (
        "_at_end",
        "_close_socket",
        "_end_when_empty",
        "_outgoing",
        "_refuses",
        "connection",
        "deadline",
        "hung_up",
        "queued",
        "readable",
        "retry_at",
        "retry_seconds",
        "sock",
        "wants_writable",
        "wide",
    )

    def __init__(
        self,
        connection: Connection,
        sock: socket.socket,
        close_socket: Callable[[socket.socket], None],
        *,
        wide: bool = True,
    ) -> None:
        """Own `sock` until `close_socket` is called with it; `wide` is the caller's to remember."""
        self.connection = connection
        self.sock: socket.socket | None = sock
        """None once the host's side is closed."""
        self.readable = True
        self.hung_up = False
        """Nothing can pass on the host's socket any more, except what is still to be read."""
        self.queued = False
        self.wants_writable = False
        self.deadline: float | None = None
        self.retry_at: float | None = None
        self.retry_seconds = 0.0
        self.wide = wide
        self._close_socket = close_socket
        self._outgoing = bytearray()
        self._at_end = False
        self._end_when_empty = False
        self._refuses = False

    @property
    def waiting_bytes(self) -> int:
        """How many bytes wait until the host's socket is writable."""
        return len(self._outgoing)

    @property
    def ready(self) -> bool:
        """Whether there may be something to send to the guest."""
        connection = self.connection
        return connection.wants_control or (
            self.readable and (connection.credit > 0 or connection.wants_credit)
        )

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do for either side."""
        connection = self.connection
        return self.sock is None and connection.state is State.CLOSED and not connection.wants_control

    def deliver(self, data: memoryview) -> None:
        """Pass on the guest's bytes, and keep what the host's socket does not take now."""
        if not self._outgoing:
            done = self._write(data)
            self.connection.delivered(done)
            data = data[done:]
        # One bytearray, not a list of pieces: a guest that sends single bytes must not cost more.
        self._outgoing += data

    def flush(self) -> None:
        """The host's socket is writable: write what waits."""
        while self._outgoing:
            with memoryview(self._outgoing) as view, view[:WRITE_STEP] as step:
                wanted = len(step)
                done = self._write(step)
            self.connection.delivered(min(done, len(self._outgoing)))
            del self._outgoing[:done]
            if done < wanted:
                return
        self._settle()

    def read_into(self, buffer: memoryview) -> int:
        """Read from the host into `buffer`; 0 if there is nothing (more) now."""
        if self.sock is None:
            return 0
        try:
            count = self.sock.recv_into(buffer)
        except BlockingIOError:
            self.readable = False
            return 0
        except OSError:
            # ECONNRESET: the client closed with bytes of the guest unread.
            self.break_off()
            return 0
        if not count:
            self.readable = False
            self._at_end = True
            self.connection.finish(SHUTDOWN_SEND)
            if self.hung_up:
                self.hang_up()
            else:
                self._settle()
        return count

    def hang_up(self) -> None:
        """The client is gone: end the stream once everything it wrote has been read."""
        self.hung_up = True
        state = self.connection.state
        if self._at_end or state is State.CLOSED:
            self.connection.finish(SHUTDOWN_BOTH)
            self._close()
        elif state in (State.WAITING, State.CONNECTING) and not self._has_unread():
            self.break_off()  # it gave up waiting
        else:
            self.readable = True

    def mark_readable(self) -> None:
        """The host's socket has something to read, if only its end."""
        self.readable = not self._at_end

    def end_after_data(self) -> None:
        """The guest sends nothing more: tell the host, behind what it has not taken yet."""
        self._end_when_empty = True
        self._settle()

    def stop_reading(self) -> None:
        """The guest reads nothing more: the client's next write fails with EPIPE."""
        self.readable = False
        self._at_end = True
        if self.sock is not None:
            _shutdown(self.sock, socket.SHUT_RD)

    def close_after_data(self) -> None:
        """The guest has forgotten the stream: close, behind what the host has not taken yet."""
        self.readable = False
        self._at_end = True
        if not self._outgoing or self.hung_up:
            self._close()

    def break_off(self) -> None:
        """End both sides at once."""
        self.connection.abort()
        self._close()

    def drop(self) -> None:
        """The guest's side is gone with its driver: close at once, without a word to the guest."""
        self.connection.forget()
        self._close()

    def _write(self, data: memoryview) -> int:
        """How many bytes are no longer ours to keep: written, or refused for good."""
        if self.sock is None or self._refuses:
            return len(data)
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            # The client reads nothing more; what it has written is still for the guest.
            self._refuses = True
            self.connection.finish(SHUTDOWN_RECEIVE)
        except OSError:
            self.break_off()
        return len(data)

    def _has_unread(self) -> bool:
        if self.sock is None:
            return False
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _settle(self) -> None:
        """Act on an end that waited for the last byte."""
        if self.sock is None or self._outgoing:
            return
        if self.connection.state is State.CLOSED:
            self._close()
        elif self._end_when_empty:
            _shutdown(self.sock, socket.SHUT_WR)
            if self.connection.both_sent_all:
                self.connection.finish(SHUTDOWN_BOTH)
                self._close()

    def _close(self) -> None:
        sock, self.sock = self.sock, None
        self.readable = False
        waiting, self._outgoing = self._outgoing, bytearray()
        self.connection.delivered(len(waiting))
        if sock is not None:
            self._close_socket(sock)


def _shutdown(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # ENOTCONN: the client is gone already, which a read will tell
        sock.shutdown(how)
