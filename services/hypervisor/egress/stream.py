"""Byte streams over sockets that already exist: plain, and TLS of which the first bytes were read.

asyncio's own TLS wants to read a connection from its first byte; a gateway has read those to learn
the name. So TLS runs on memory buffers here, and what was read goes in first.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Final, Protocol

CHUNK: Final = 64 << 10
# A peer that has not finished its TLS handshake by then will not: a round trip is under a second.
HANDSHAKE_SECONDS: Final = 30.0

Count = Callable[[int, int], None]


class StreamError(ConnectionError):
    """The connection cannot go on: TLS failed or was cut off."""


class Stream(Protocol):
    """A connection. One task reads; any number write."""

    @property
    def secure(self) -> bool:
        """Whether it is TLS."""

    @property
    def alpn(self) -> str:
        """The protocol agreed on; empty if none was."""

    async def read(self) -> bytes:
        """At most 64 KiB; empty at the end."""

    async def write(self, data: bytes) -> None:
        """Return once the kernel has taken all of it: that is the back-pressure."""

    def close(self) -> None:
        """Say goodbye if that can be done at once, and close. Idempotent."""

    def stale(self) -> bool:
        """Whether an idle connection has something to read, that is an end or nonsense."""


class PlainStream:
    """A socket as it is.

    Args:
        sock: Non-blocking; owned from now on.
        first: What was read from it already.
        count: Told bytes read and bytes written, as the network carries them.
    """

    secure = False
    alpn = ""

    def __init__(self, sock: socket.socket, first: bytes = b"", count: Count | None = None) -> None:
        sock.setblocking(False)
        self._count = count or _uncounted
        self._sock = sock
        self._first = first
        self._lock = asyncio.Lock()

    async def read(self) -> bytes:
        """At most 64 KiB; empty at the end."""
        if self._first:
            first, self._first = self._first, b""
            return first
        try:
            data = await asyncio.get_running_loop().sock_recv(self._sock, CHUNK)
        except OSError as error:
            raise StreamError(f"the connection broke: {error.strerror or error}") from error
        self._count(len(data), 0)
        return data

    async def write(self, data: bytes) -> None:
        """Return once the kernel has taken all of it."""
        async with self._lock:
            try:
                await asyncio.get_running_loop().sock_sendall(self._sock, data)
            except OSError as error:
                raise StreamError(f"the connection broke: {error.strerror or error}") from error
        self._count(0, len(data))

    def close(self) -> None:
        """Close it. What was written still arrives."""
        self._sock.close()

    def stale(self) -> bool:
        """Whether there is something to read, or an end."""
        return bool(self._first) or _readable(self._sock)


class TlsStream:
    """TLS on a socket; made by `serve_tls` and `connect_tls`."""

    secure = True

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        name: str | None,
        first: bytes = b"",
        count: Count | None = None,
    ) -> None:
        sock.setblocking(False)
        self._count = count or _uncounted
        self._sock = sock
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=name is None, server_hostname=name)
        self._lock = asyncio.Lock()
        self._closed = False
        if first:
            self._in.write(first)

    @property
    def alpn(self) -> str:
        """The protocol agreed on; empty if none was."""
        return self._tls.selected_alpn_protocol() or ""

    async def handshake(self) -> None:
        """Raises StreamError: the peer does not speak TLS or does not trust us, or we it."""
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                while True:
                    try:
                        self._tls.do_handshake()
                    except ssl.SSLWantReadError:
                        await self._flush()
                        if not await self._fill():
                            raise StreamError("the peer hung up during the TLS handshake") from None
                    else:
                        break
                await self._flush()
        except ssl.SSLError as error:
            with contextlib.suppress(StreamError):
                await self._flush()  # the alert that says why
            raise StreamError(f"TLS failed: {_words(error)}") from error
        except TimeoutError as error:
            raise StreamError(f"no TLS handshake within {HANDSHAKE_SECONDS:g} s") from error

    async def read(self) -> bytes:
        """At most 64 KiB; empty at the end.

        Raises:
            StreamError: it was cut off without TLS's own end, or is damaged.
        """
        while True:
            try:
                return self._tls.read(CHUNK)
            except ssl.SSLWantReadError:
                await self._flush()
                if not await self._fill():
                    self._in.write_eof()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                # Peers that just close are so common that HTTP's own framing must tell a cut.
                return b""
            except ssl.SSLError as error:
                raise StreamError(f"TLS failed: {_words(error)}") from error

    async def write(self, data: bytes) -> None:
        """Return once the kernel has taken all of it."""
        view = memoryview(data)
        while view:
            try:
                sent = self._tls.write(view[:CHUNK])
            except ssl.SSLWantReadError:
                raise StreamError("the peer renegotiates TLS, which is not supported") from None
            except ssl.SSLError as error:
                raise StreamError(f"TLS failed: {_words(error)}") from error
            view = view[sent:]
            await self._flush()

    def close(self) -> None:
        """Send TLS's end if the kernel takes it at once, and close."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ssl.SSLError, OSError):
            try:
                self._tls.unwrap()
            except ssl.SSLWantReadError:
                if not self._lock.locked():
                    self._sock.send(self._out.read())
        self._sock.close()

    def stale(self) -> bool:
        """Whether there is something to read, or an end."""
        return self._in.pending > 0 or self._tls.pending() > 0 or _readable(self._sock)

    async def _fill(self) -> bool:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._sock, CHUNK)
        except OSError as error:
            raise StreamError(f"the connection broke: {error.strerror or error}") from error
        self._count(len(data), 0)
        self._in.write(data)
        return bool(data)

    async def _flush(self) -> None:
        async with self._lock:  # records leave in the order that they were made in
            data = self._out.read()
            if not data:
                return
            try:
                await asyncio.get_running_loop().sock_sendall(self._sock, data)
            except OSError as error:
                raise StreamError(f"the connection broke: {error.strerror or error}") from error
            self._count(0, len(data))


async def serve_tls(
    sock: socket.socket, context: ssl.SSLContext, first: bytes, count: Count | None = None
) -> TlsStream:
    """Speak TLS as the server to a peer that has already sent `first`.

    Raises:
        StreamError: no handshake; the socket is closed.
    """
    return await _shake(TlsStream(sock, context, None, first, count))


async def connect_tls(sock: socket.socket, context: ssl.SSLContext, name: str) -> TlsStream:
    """Speak TLS as the client to the server `name`, which must prove to be it.

    Raises:
        StreamError: no handshake, or a certificate that does not count; the socket is closed.
    """
    return await _shake(TlsStream(sock, context, name))


async def _shake(stream: TlsStream) -> TlsStream:
    try:
        await stream.handshake()
    except BaseException:
        stream.close()
        raise
    return stream


def _uncounted(_: int, __: int) -> None:
    pass


def _readable(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True
    return True


def _words(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate does not count: {error.verify_message}"
    return (error.reason or str(error)).replace("_", " ").lower()
