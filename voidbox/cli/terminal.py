"""Our standard streams: read without blocking the loop, written in order, and the raw terminal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import struct
import termios
import threading
import tty
from collections.abc import AsyncIterator, Iterator

CHUNK_BYTES = 64 * 1024


async def read_stdin(fd: int = 0) -> AsyncIterator[bytes]:
    """Standard input, piece by piece, whatever it is: pipe, file, terminal.

    The reads are made in a daemon thread of our own: a file cannot be waited for by the loop,
    and a read that nobody answers must not keep the process from ending.
    """
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[bytes] = asyncio.Queue()
    taken = threading.Semaphore(1)

    def read() -> None:
        while taken.acquire():
            try:
                data = os.read(fd, CHUNK_BYTES)
            except OSError:  # a terminal that went away
                data = b""
            try:
                loop.call_soon_threadsafe(pieces.put_nowait, data)
            except RuntimeError:  # the loop has ended
                return
            if not data:
                return

    threading.Thread(target=read, name="stdin", daemon=True).start()
    while data := await pieces.get():
        yield data
        taken.release()


def is_piped(fd: int = 0) -> bool:
    """Whether `fd` is something that a program is fed from: a pipe, socket or file."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:  # closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)


async def write_all(fd: int, data: bytes) -> None:
    """Write everything; the reader's pace is ours.

    Raises:
        BrokenPipeError: nobody reads any more.
    """
    await asyncio.to_thread(_write_all, fd, data)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # somebody made the terminal non-blocking
            os.set_blocking(fd, True)
        except OSError as error:
            if error.errno == errno.EBADF:  # closed from the start: as good as /dev/null
                return
            raise


def window_size(fd: int) -> tuple[int, int]:
    """Columns and rows of the terminal; 80 by 24 if it does not tell."""
    with contextlib.suppress(OSError):
        rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
        if rows and columns:
            return columns, rows
    return 80, 24


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """The terminal hands every key to us, and is as it was afterwards."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
