"""Reading a box's console log."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

from services.hypervisor import console_ring
from services.hypervisor.inotify import rounds

_ESCAPES = re.compile(rb"\x1b(\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_c])|[\x00-\x08\x0b-\x1f\x7f]")


def create(path: Path) -> int:
    """Make an empty log; returns a descriptor for its writer."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    console_ring.create(fd)
    return fd


def printable(data: bytes) -> str:
    """Console or log output as text without escape sequences and control characters."""
    return _ESCAPES.sub(b"", data).decode(errors="replace").strip()


def tail(path: Path, length: int = 4000) -> str:
    """The end of a log as printable text; empty if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return printable(console_ring.read(fd, console_ring.end(fd) - length, length)[1])
    except console_ring.DamagedRing:
        return ""
    finally:
        os.close(fd)


async def read(
    path: Path, offset: int, *, follow: bool, ended: asyncio.Event
) -> AsyncIterator[tuple[int, bytes]]:
    """Yield (offset, bytes) from `offset` on; what is no longer kept is skipped.

    Args:
        path: The log.
        offset: Where to start; negative counts from the present end.
        follow: Whether to wait for more until `ended`.
        ended: Set when the box has ended.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        position = max(0, console_ring.end(fd) + offset) if offset < 0 else offset
        async with aclosing(rounds(path, follow=follow, ended=ended)) as following:
            async for _ in following:
                start, data = console_ring.read(fd, position)
                while data:
                    yield start, data
                    position = start + len(data)
                    start, data = console_ring.read(fd, position)
    finally:
        os.close(fd)
