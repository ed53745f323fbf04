"""One TCP connection to a port of the guest's loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from guest.errors import AgentError, Code, invalid

_CHUNK = 65536
_CONNECT_SECONDS = 5.0  # loopback answers at once or not at all


async def tunnel(port: int, incoming: AsyncIterator[bytes], send: Callable[[bytes], Awaitable[None]]) -> None:
    """Carry `incoming` to the port and what it answers to `send`, until both have ended.

    The first thing sent is empty: the connection stands. The end of `incoming` is passed
    on as a half-close.

    Raises:
        AgentError: nothing listens there.
    """
    if not 1 <= port <= 65535:
        raise invalid(f"port {port} is not 1 to 65535", port=port)
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await loop.sock_connect(sock, ("127.0.0.1", port))
        except OSError as error:
            raise AgentError(
                Code.UNAVAILABLE,
                "NOTHING_LISTENS",
                f"port {port} of the guest's loopback: {error.strerror or error}",
                port=port,
            ) from error
        await send(b"")
        outward = asyncio.ensure_future(_outward(sock, send))
        inward = asyncio.ensure_future(_inward(sock, incoming))
        try:
            await asyncio.wait((outward, inward), return_when=asyncio.FIRST_COMPLETED)
            if inward.done():
                inward.result()
            await outward
        finally:
            for task in (outward, inward):
                task.cancel()
            await asyncio.gather(outward, inward, return_exceptions=True)


async def _outward(sock: socket.socket, send: Callable[[bytes], Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):  # a reset ends the stream like a close
        while data := await loop.sock_recv(sock, _CHUNK):
            await send(data)


async def _inward(sock: socket.socket, incoming: AsyncIterator[bytes]) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):
        async for data in incoming:
            await loop.sock_sendall(sock, data)
        sock.shutdown(socket.SHUT_WR)
