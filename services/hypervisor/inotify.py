"""Waiting for a file to grow, by inotify(7)."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import AsyncGenerator
from pathlib import Path

_IN_MODIFY = 0x2
_libc = ctypes.CDLL(None, use_errno=True)


class FileWatch:
    """Wakes whoever waits when a file is written to. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._changed = asyncio.Event()

    def __enter__(self) -> FileWatch:
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        try:
            _checked(_libc.inotify_add_watch(self._fd, os.fsencode(self._path), _IN_MODIFY))
        except OSError:
            os.close(self._fd)
            raise
        asyncio.get_running_loop().add_reader(self._fd, self._on_event)
        return self

    def _on_event(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 65536)
        self._changed.set()

    def clear(self) -> None:
        """Forget changes so far. Read the file after this, then `wait`: no change is missed."""
        self._changed.clear()

    async def wait(self) -> None:
        """Return when the file was written to since `clear`."""
        await self._changed.wait()

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)


async def rounds(path: Path, *, follow: bool, ended: asyncio.Event) -> AsyncGenerator[None, None]:
    """Yield each time the file is to be read to its end: once, or until `ended` has been set if `follow`.

    Nothing that is written before `ended` is missed. To be closed by whoever leaves early.

    Raises:
        OSError: the file cannot be watched.
    """
    with FileWatch(path) as watch:
        end = asyncio.create_task(ended.wait())
        try:
            while True:
                watch.clear()
                last = not follow or ended.is_set()
                yield
                if last:
                    return
                change = asyncio.create_task(watch.wait())
                await asyncio.wait({change, end}, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
        finally:
            end.cancel()


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
