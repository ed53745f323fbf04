"""Bytes from one socket to another without touching them: splice(2) through a pipe, one turn at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable

CHUNK = 1 << 20
_KEPT_PIPES = 64

Count = Callable[[int], Awaitable[None]]
Look = Callable[[bytes], None]


class Pipes:
    """Pipes to splice through; one is in use only while something is in it, so idle connections have none."""

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []

    def take(self) -> tuple[int, int]:
        """An empty pipe."""
        return self._free.pop() if self._free else os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def give(self, pipe: tuple[int, int], *, empty: bool) -> None:
        """Take it back; it is closed if something is left in it."""
        if empty and len(self._free) < _KEPT_PIPES:
            self._free.append(pipe)
        else:
            os.close(pipe[0])
            os.close(pipe[1])

    def close(self) -> None:
        """Close all that are free."""
        while self._free:
            self.give(self._free.pop(), empty=False)


async def ready(fd: int, *, write: bool = False) -> None:
    """Wait until a descriptor can be read or written. One waits for each at a time."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    (loop.add_writer if write else loop.add_reader)(fd, wake)
    try:
        await future
    finally:
        (loop.remove_writer if write else loop.remove_reader)(fd)


async def pump(source: socket.socket, target: socket.socket, pipes: Pipes, count: Count) -> None:
    """Move bytes until `source` ends, then say so to `target`.

    Raises:
        OSError: one of them broke.
    """
    reading, writing = source.fileno(), target.fileno()
    while True:
        pipe = pipes.take()
        left = 0
        try:
            try:
                left = moved = os.splice(
                    reading, pipe[1], CHUNK, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
                )
            except BlockingIOError:
                moved = -1
            while left:
                try:
                    left -= os.splice(pipe[0], writing, left, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)
                except BlockingIOError:
                    await ready(writing, write=True)
        finally:
            pipes.give(pipe, empty=left == 0)
        if moved < 0:
            await ready(reading)
        elif moved:
            await count(moved)
        else:
            break
    with contextlib.suppress(OSError):  # it may be gone already
        target.shutdown(socket.SHUT_WR)


async def pump_looked_at(
    source: socket.socket, target: socket.socket, first: bytes, look: Look, count: Count
) -> None:
    """As `pump`, but every piece is shown to `look` before it is passed on; what `look` raises ends it.

    Args:
        source: Where bytes come from.
        target: Where they go.
        first: Bytes that have been read of `source`, and looked at.
        look: Sees each piece.
        count: Is told of each piece.
    """
    loop = asyncio.get_running_loop()
    data = first
    while True:
        if data:
            await loop.sock_sendall(target, data)
            await count(len(data))
        data = await loop.sock_recv(source, 65536)
        if not data:
            break
        look(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


async def both(outward: Awaitable[None], inward: Awaitable[None]) -> None:
    """Run two directions to their ends; the first failure ends both."""
    tasks = [asyncio.ensure_future(outward), asyncio.ensure_future(inward)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def reset(one: socket.socket) -> None:
    """Close a socket so that the other side sees a reset, not an orderly end."""
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    one.close()
