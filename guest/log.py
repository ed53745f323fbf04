"""The guest's log: one line at a time to the kernel's log, never to a terminal.

A write to a serial console blocks for as long as the host is slow to read it, and a
blocked PID 1 is a dead box. /dev/kmsg never blocks; the kernel prints it when it can.
"""

from __future__ import annotations

import contextlib
import os

_fd = -1
_LIMIT = 900  # a kmsg record is at most 1024 bytes, with its prefix


def open_log(path: str) -> None:
    """Log to `path` (/dev/kmsg in a guest) from now on; a missing path means: no log."""
    global _fd
    try:
        _fd = os.open(
            path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o600
        )
    except OSError:
        _fd = -1


def info(text: str) -> None:
    """Log a normal event."""
    _write(6, text)


def warning(text: str) -> None:
    """Log something that the box survives but somebody should read."""
    _write(4, text)


def error(text: str) -> None:
    """Log a failure."""
    _write(3, text)


def _write(level: int, text: str) -> None:
    if _fd < 0:
        return
    line = " ".join(text.split()).encode(errors="backslashreplace")[:_LIMIT]
    with contextlib.suppress(OSError):
        os.write(_fd, b"<%d>voidbox: %s\n" % (level, line))
