"""Writes a file's blocks one behind the other, past the page cache where the file system can.

An image is written once and must be on the disk before it has a name. Through the page cache each
gigabyte costs 0.8 to 1.3 s of a processor and half a second of waiting in fsync; past it 0.05 s
and none. Blocks are gathered in a few aligned buffers that a thread of its own writes, so that who
fills them does not wait for a disk that keeps up.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
from types import TracebackType
from typing import Final, Self

from services.imager.ext4_format import BLOCK
from services.imager.writeback import WRITEBACK_BYTES, start_writeback

_BUFFER: Final = 4 << 20
_BUFFERS: Final = 5  # 20 MiB: more than arrives while one is written and the interpreter's lock is awaited
_ZEROS: Final = memoryview(bytes(BLOCK))
_NONE: Final = -1


class BlockFile:
    """Appends to an open file from one block on; a context manager that ends its thread.

    Other parts of the file may be written by others at the same time.

    Args:
        descriptor: Of the file, open for writing; it is not kept.
        start: Number of the first block.
    """

    def __init__(self, descriptor: int, start: int) -> None:
        self._plain, self._direct = os.dup(descriptor), _open_direct(descriptor)
        self._buffer = mmap.mmap(-1, _BUFFER)  # begins with a page: direct writes need that
        self._at = 0
        self._offset = start * BLOCK  # where `_buffer` goes
        self._spare: list[mmap.mmap] = []
        self._in_flight = 0
        self._full: queue.SimpleQueue[tuple[mmap.mmap, int, int] | None] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._unsent = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; what was not flushed is lost. Twice does no harm."""
        if self._thread is not None:
            self._full.put(None)
            self._thread.join()
            self._thread = None
        for descriptor in (self._plain, self._direct):
            if descriptor != _NONE:
                os.close(descriptor)
        self._plain = self._direct = _NONE

    def put(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`, and zeros to the end of its last block.

        Raises:
            OSError: an earlier block could not be written.
        """
        end = self._at + len(data)
        if end > _BUFFER - BLOCK:
            self.write(data)
            self.pad()
            return
        self._buffer[self._at : end] = data
        if used := end % BLOCK:
            following = end + BLOCK - used
            self._buffer[end:following] = _ZEROS[used:]
            end = following
        self._at = end

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`; where that ends within a block, more or `pad` must follow.

        Raises:
            OSError: an earlier block could not be written.
        """
        view = memoryview(data)
        while len(view) >= _BUFFER - self._at:
            some = _BUFFER - self._at
            self._buffer[self._at : _BUFFER] = view[:some]
            self._at, view = _BUFFER, view[some:]
            self._hand_over()
        self._buffer[self._at : self._at + len(view)] = view
        self._at += len(view)

    def pad(self) -> None:
        """Fill the block that was begun with zeros."""
        if used := self._at % BLOCK:
            self.write(_ZEROS[used:])

    def flush(self) -> None:
        """Wait until all blocks are in the file, which is not synced.

        Raises:
            OSError: one could not be written.
        """
        if self._at:
            self._hand_over()
        while self._in_flight:
            self._spare.append(self._take_back())
        self._check()

    def _hand_over(self) -> None:
        """Have the buffer written, and go on with another one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="block-writer", daemon=True)
            self._thread.start()
        self._full.put((self._buffer, self._at, self._offset))
        self._in_flight += 1
        self._offset += self._at
        self._at = 0
        if self._spare:
            self._buffer = self._spare.pop()
        elif self._in_flight < _BUFFERS and self._written.empty():
            self._buffer = mmap.mmap(-1, _BUFFER)
        else:
            self._buffer = self._take_back()
        self._check()

    def _take_back(self) -> mmap.mmap:
        buffer = self._written.get()
        self._in_flight -= 1
        return buffer

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._full.get()) is not None:
            buffer, length, offset = item
            if self._error is None:  # after one the rest is of no use
                try:
                    self._store(memoryview(buffer)[:length], offset)
                except OSError as error:
                    self._error = error
            self._written.put(buffer)

    def _store(self, data: memoryview, offset: int) -> None:
        while data:
            try:
                count = os.pwrite(self._plain if self._direct == _NONE else self._direct, data, offset)
            except OSError as error:
                # The file system wants larger blocks, or after a short write (a full disk) whole ones.
                if error.errno != errno.EINVAL or self._direct == _NONE:
                    raise
                os.close(self._direct)
                self._direct = _NONE
                continue
            data, offset = data[count:], offset + count
            self._unsent += count
        if self._direct == _NONE and self._unsent >= WRITEBACK_BYTES:
            self._unsent = 0
            start_writeback(self._plain)


def _open_direct(descriptor: int) -> int:
    """The same file, opened for direct writes, or `_NONE` where that cannot be."""
    flag = getattr(os, "O_DIRECT", 0)  # of Linux alone
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_CLOEXEC | flag) if flag else _NONE
    except OSError:  # not on every file system, and not where /proc is missing
        return _NONE
