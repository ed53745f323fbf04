"""The console log: a file of fixed length that keeps the newest bytes, written by the shim.

Format: 8 bytes magic, 8 bytes little-endian count of all bytes ever written, then the ring; byte
number n of the stream is at n modulo the ring's length. A guest that floods its console costs a
constant piece of disk, and offsets stay those of the stream. Imports only the standard library:
the shim starts with it, and writes by calls that its seccomp list has.
"""

from __future__ import annotations

import os
import struct

MAGIC = b"VBCONS1\n"
HEADER = struct.Struct("<8sQ")
RING_BYTES = 1 << 20
CHUNK_BYTES = 1 << 16
"""The most that is written at once, and so the most that a reader may find half overwritten."""


class DamagedRing(ValueError):
    """The file is not a console log."""


def create(fd: int, length: int = RING_BYTES) -> None:
    """Make the empty file `fd` an empty log that keeps `length` bytes."""
    os.pwrite(fd, HEADER.pack(MAGIC, 0), 0)
    # Reserved, so that what a guest says while the disk is full is kept: it is about the full disk.
    os.posix_fallocate(fd, 0, HEADER.size + length)


class Writer:
    """Appends to a log; there is one writer."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._length, self._total = _state(fd)

    def append(self, data: bytes) -> None:
        """Add `data`, at most `CHUNK_BYTES`.

        Raises:
            OSError: the disk failed; the log is as before.
        """
        data = data[:CHUNK_BYTES]
        at = self._total % self._length
        first = data[: self._length - at]
        os.pwrite(self._fd, first, HEADER.size + at)
        if rest := data[len(first) :]:
            os.pwrite(self._fd, rest, HEADER.size)
        os.pwrite(self._fd, HEADER.pack(MAGIC, self._total + len(data)), 0)
        self._total += len(data)


def end(fd: int) -> int:
    """The offset after the last byte."""
    return _state(fd)[1]


def read(fd: int, offset: int, most: int = CHUNK_BYTES) -> tuple[int, bytes]:
    """The kept bytes from `offset` on, at most `most`, and the offset of the first of them.

    Empty at the end. Safe beside the writer: what it may have overwritten meanwhile is dropped.
    """
    length, total = _state(fd)
    start = min(max(offset, _first(length, total)), total)
    wanted = min(most, total - start)
    at = start % length
    data = os.pread(fd, min(wanted, length - at), HEADER.size + at)
    if len(data) < wanted:
        data += os.pread(fd, wanted - len(data), HEADER.size)
    lost = max(0, _first(*_state(fd)) - start)
    return start + lost, data[lost:]


def _first(length: int, total: int) -> int:
    return max(0, total - length + CHUNK_BYTES)


def _state(fd: int) -> tuple[int, int]:
    header = os.pread(fd, HEADER.size, 0)
    length = os.fstat(fd).st_size - HEADER.size
    if len(header) < HEADER.size or header[:8] != MAGIC or length <= CHUNK_BYTES:
        raise DamagedRing("not a console log")
    return length, HEADER.unpack(header)[1]
