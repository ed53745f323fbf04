"""A log file that is rotated by size."""

from __future__ import annotations

import os
from pathlib import Path

# One service writes a few hundred bytes per run and box.
MAX_BYTES = 5 * 1024 * 1024
KEPT_FILES = 3


class LogFile:
    """Appends to `path`; full files become `path.1` … `path.3`, the oldest is dropped."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, kept: int = KEPT_FILES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._kept = kept
        self._fd = -1
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append `data`; it is never split over two files."""
        if self._fd >= 0 and self._size and self._size + len(data) > self._max_bytes:
            self.close()
            self._rotate()
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._fd).st_size
        self._size += os.write(self._fd, data)

    def close(self) -> None:
        """Close the file; a later `write` opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _rotate(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n + 1}") for n in range(self._kept))]
        for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
            if newer.exists():
                newer.replace(older)


def tail(path: Path, lines: int = 15) -> list[str]:
    """The last lines of a log file; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 64 * 1024))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []
