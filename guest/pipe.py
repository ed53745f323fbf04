"""A pipe between the event loop and a thread: bounded, with back-pressure both ways."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

_Result = TypeVar("_Result")


def in_thread(work: Callable[[], _Result]) -> asyncio.Future[_Result]:
    """Run `work` in a thread of its own: a long transfer must not take one of the pool's few."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        try:
            result, failure = work(), None
        except BaseException as error:
            result, failure = None, error
        loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, daemon=True).start()
    return future


class ReadEnd:
    """The loop's end of a pipe that a thread writes to."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd

    async def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        while True:
            try:
                return os.read(self._fd, size)
            except BlockingIOError:
                await _ready(self._fd, writing=False)

    def close(self) -> None:
        """Close it; the thread's next write fails with EPIPE."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class WriteEnd:
    """The loop's end of a pipe that a thread reads from."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd

    async def write(self, data: bytes) -> None:
        """Write all of `data`.

        Raises:
            BrokenPipeError: the thread has closed its end.
        """
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await _ready(self._fd, writing=True)

    def close(self) -> None:
        """Close it; the thread sees the end of the data."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


async def _ready(fd: int, *, writing: bool) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    add(fd, _settle, future)
    try:
        await future
    finally:
        remove(fd)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
