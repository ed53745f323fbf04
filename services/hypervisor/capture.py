"""Copies the memory of a stopped machine: what it shares with its origin, and what it has changed.

A restored machine maps a sealed memfd privately. /proc/PID/pagemap
(Documentation/admin-guide/mm/pagemap.rst) tells which of its pages are its own by now: bit 63 or 62
(in memory or swapped out) without bit 61 (a page of the file). Only those are read while it stands still.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from services.common.errors import WrongState
from services.hypervisor import saved

PAGE = mmap.PAGESIZE
_ENTRY = 8
_PIECE = 1 << 20
_RUN_PAGES = 256
_OWN = 0b110  # bits 62 and 63 of the top three; bit 61 is a page of the file


def opened(pid: int) -> Memory:
    """The memory of the machine that process `pid` runs; a context manager. Blocks.

    Raises:
        WrongState: see `Memory`.
    """
    memory = Memory(pid)
    memory.open()
    return memory


class Memory:
    """The memory of one machine, found by its QEMU's pid. A context manager once it is open.

    Raises:
        WrongState: it is not one that was restored, or cannot be read by this process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stack = contextlib.ExitStack()
        self.start = 0
        self.size = 0
        self.origin_fd = -1

    def open(self) -> None:
        """Find it; see the class for what is raised."""
        try:
            self._open()
        except OSError as error:
            self._stack.close()
            raise WrongState(
                f"the memory of process {self._pid} cannot be read: {error.strerror}; the hypervisor must be "
                "root, or must have started the box itself",
                reason="MEMORY_NOT_READABLE",
            ) from error
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        base = Path(f"/proc/{self._pid}")
        inode = ""
        for line in (base / "maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(f"/memfd:{saved.RAM_NAME}"):
                first, last = (int(word, 16) for word in fields[0].split("-"))
                if not fields[1].endswith("p") or (
                    inode and (inode != fields[4] or first != self.start + self.size)
                ):
                    raise WrongState("the machine's memory is not mapped as expected", reason="NOT_RESTORED")
                self.start, inode = self.start or first, fields[4]
                self.size = last - self.start
        if not self.size:
            raise WrongState(
                "only a box that was restored can be saved, not one that booted by itself (cold_boot)",
                reason="BOX_BOOTED_COLD",
            )
        for link in os.scandir(base / "fd"):
            with contextlib.suppress(OSError):
                if os.stat(link.path).st_ino == int(inode):
                    self.origin_fd = self._own(os.open(link.path, os.O_RDONLY | os.O_CLOEXEC))
                    break
        else:
            raise WrongState("the machine's memory file is not open any more", reason="NOT_RESTORED")
        self._memory = self._own(os.open(base / "mem", os.O_RDONLY | os.O_CLOEXEC))
        self._pagemap = self._own(os.open(base / "pagemap", os.O_RDONLY | os.O_CLOEXEC))

    def _own(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def copy_origin(self, target_fd: int) -> None:
        """Copy what the machine was restored from, which never changes. Blocks: 0.1 s for 200 MiB."""
        for start, length in saved.data_parts(self.origin_fd):
            end = start + length
            while start < end:
                piece = os.pread(self.origin_fd, min(_PIECE, end - start), start)
                start += os.pwrite(target_fd, piece, start)

    def copy_own(self, target_fd: int) -> int:
        """Lay the machine's own pages over; it must stand still. Blocks: 0.05 s for 60 MiB.

        Returns:
            How many bytes those are.
        """
        copied = 0
        with mmap.mmap(target_fd, self.size) as target, memoryview(target) as view:
            for at, length in self._runs():
                done = 0
                while done < length:
                    part = view[at + done : at + length]
                    count = os.preadv(self._memory, [part], self.start + at + done)
                    part.release()
                    if count <= 0:
                        raise OSError(5, "the machine's memory ended early")
                    done += count
                copied += length
        return copied

    def _runs(self) -> Iterator[tuple[int, int]]:
        """The parts (offset, length) of the memory that are the machine's own."""
        entries = os.pread(self._pagemap, self.size // PAGE * _ENTRY, self.start // PAGE * _ENTRY)
        tops = entries[_ENTRY - 1 :: _ENTRY]
        begin = -1
        for number, top in enumerate(tops):
            own = top >> 5 & _OWN and not top >> 5 & 1
            if own and begin < 0:
                begin = number
            elif begin >= 0 and (not own or number - begin >= _RUN_PAGES):
                yield begin * PAGE, (number - begin) * PAGE
                begin = number if own else -1
        if begin >= 0:
            yield begin * PAGE, (len(tops) - begin) * PAGE
