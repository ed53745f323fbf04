"""Begins to bring written data to the disk below, so that a sync at the end has little to wait for."""

from __future__ import annotations

import ctypes
from typing import Final

WRITEBACK_BYTES: Final = 32 << 20  # worth a system call
_WRITE: Final = 0x2  # SYNC_FILE_RANGE_WRITE, linux/fs.h
# Linux alone has it; elsewhere the sync at the end does all.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


def start_writeback(descriptor: int) -> None:
    """Start to write all dirty pages of a file; waits for none of them, and makes nothing safe."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE)
