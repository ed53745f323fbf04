"""Between processes, one builder of a thing at a time: flock(2) on a file beside it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from services.imager.limits import Cancel

_WAIT_SECONDS: Final = 0.05  # between tries for a lock: flock(2) cannot be waited for and cancelled


@contextmanager
def held(path: Path, cancel: Cancel, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, from a thread; the kernel drops it with its holder.

    Raises:
        Cancelled: the caller cancelled while waiting.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        while True:
            try:
                fcntl.flock(handle, how | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                cancel.event.wait(_WAIT_SECONDS)
                cancel.check()
        yield
    finally:
        os.close(handle)


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
