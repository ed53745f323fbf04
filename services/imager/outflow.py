"""What a thread writes, as an asynchronous stream: a pipe between them holds the writer back."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable
from typing import BinaryIO, Final

from services.imager.jobs import Jobs
from services.imager.limits import Cancel

_BUFFER: Final = 256 << 10


class _Once:
    """A descriptor for whoever comes first: the thread that writes, or the one that gives up before."""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle
        self._lock = threading.Lock()

    def take(self) -> int | None:
        with self._lock:
            handle, self._handle = self._handle, None
            return handle


async def outflow(
    jobs: Jobs, work: Callable[[BinaryIO, Cancel], None], piece: int
) -> AsyncGenerator[bytes, None]:
    """What `work` writes to the file it is given, at most `piece` bytes at once.

    An error of `work` comes after the bytes that it wrote before. Closing the stream early
    cancels it, and its next write fails.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sink = _Once(writing)

    def pump(cancel: Cancel) -> None:
        handle = sink.take()
        if handle is not None:
            with os.fdopen(handle, "wb", buffering=_BUFFER) as out:
                work(out, cancel)

    reader = asyncio.StreamReader(limit=_BUFFER)
    source = os.fdopen(reading, "rb", buffering=0)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    task = asyncio.ensure_future(jobs.run_long(pump))
    try:
        while data := await reader.read(piece):
            yield data
        await task
    finally:
        transport.close()
        task.cancel()
        unused = sink.take()
        if unused is not None:
            os.close(unused)
