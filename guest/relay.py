"""Pumps bytes between connections from the host and the gRPC server's unix socket.

The published grpcio cannot listen on AF_VSOCK. Half-close is passed on, a slow side
slows the other, and only the host (CID 2) is let in: a program in the guest could
otherwise reach the agent by the guest's own CID.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from guest import log

_HOST_CID = 2  # VMADDR_CID_HOST
_BUFFER = 128 * 1024
_MAX_CONNECTIONS = 64


class Relay:
    """Accepts from `listener` until cancelled, and connects each to `target`."""

    def __init__(self, listener: socket.socket, target: str) -> None:
        self._listener = listener
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled; ends all connections then."""
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        try:
            while True:
                peer, address = await loop.sock_accept(self._listener)
                if not self._welcome(address) or len(self._tasks) >= _MAX_CONNECTIONS:
                    log.warning(f"refused a connection from {address!r}")
                    peer.close()
                    continue
                task = loop.create_task(self._connect(peer))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _welcome(self, address: object) -> bool:
        if self._listener.family != socket.AF_VSOCK:
            return True
        return isinstance(address, tuple) and address[0] == _HOST_CID

    async def _connect(self, peer: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with peer, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inner:
            inner.setblocking(False)
            peer.setblocking(False)
            try:
                await loop.sock_connect(inner, self._target)
                await _join(peer, inner)
            except ConnectionError:
                pass  # one side has gone without a good-bye, which is how clients go
            except OSError as error:
                log.warning(f"connection ended: {error}")


async def _join(left: socket.socket, right: socket.socket) -> None:
    """Copy both ways until both directions have ended; an error in one ends both."""
    tasks = [asyncio.ensure_future(_copy(left, right)), asyncio.ensure_future(_copy(right, left))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _copy(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(_BUFFER))
    while True:
        count = await loop.sock_recv_into(source, buffer)
        if count == 0:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
            return
        await loop.sock_sendall(sink, buffer[:count])
