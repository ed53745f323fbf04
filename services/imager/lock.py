"""Between processes, one builder of a thing at a time: flock(2) on a file beside it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path


@asynccontextmanager
async def locked(path: Path) -> AsyncIterator[None]:
    """Hold `path` exclusively; it is created if missing and never removed.

    The kernel drops the lock with its holder, so a killed builder blocks nobody.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle = await _wait(handle)
    except BaseException:
        os.close(handle)
        raise
    try:
        yield
    finally:
        os.close(handle)


async def _wait(handle: int) -> int:
    """Wait for the lock of `handle` in a thread of its own, and return `handle`.

    A daemon thread, not `to_thread`: flock(2) cannot be interrupted from outside, and a
    cancelled waiter must not keep the process from exiting.
    """
    loop = asyncio.get_running_loop()
    won: asyncio.Future[int] = loop.create_future()

    def deliver() -> None:
        if won.cancelled():
            os.close(handle)
        else:
            won.set_result(handle)

    def block() -> None:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: nobody waits any more
            os.close(handle)

    threading.Thread(target=block, name="flock", daemon=True).start()
    return await won
