"""Writable disks: a private qcow2 layer in the box's directory above a read-only base image."""

from __future__ import annotations

import os
from pathlib import Path

from services.common import process
from services.common.errors import Exhausted
from services.hypervisor.model import Disk
from services.hypervisor.programs import Programs

_MIB = 1 << 20
EXTRA_MIB = 1024
_CREATE_SECONDS = 60.0
_NO_SPACE = ("No space left on device", "Disk quota exceeded")


def overlay_bytes(base_bytes: int, disk_mib: int) -> int:
    """Length of the writable disk: never shorter than its base, whose file system it continues."""
    wanted = disk_mib * _MIB if disk_mib else base_bytes + EXTRA_MIB * _MIB
    return -(-max(base_bytes, wanted) // _MIB) * _MIB


async def make_overlay(programs: Programs, disk: Disk, base_fd: int, disk_mib: int, path: Path) -> int:
    """Make the layer at `path` and return a descriptor of it for reading and writing.

    The image names no backing file: the machine's command line does, by descriptor.

    Raises:
        Exhausted: the host's disk is full; nothing is left at `path`.
    """
    base = os.fstat(base_fd).st_size if disk.format == "raw" else _qcow2_bytes(base_fd)
    argv: list[str | os.PathLike[str]] = [
        programs.image,
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "lazy_refcounts=on",
        path,
    ]
    try:
        await process.run([*argv, str(overlay_bytes(base, disk_mib))], seconds=_CREATE_SECONDS)
    except process.CommandFailed as error:
        path.unlink(missing_ok=True)
        if any(text in error.message for text in _NO_SPACE):
            raise Exhausted(
                f"the disk of {path.parent} is full; free space or set VOIDBOX_STATE_DIR",
                reason="DISK_FULL",
                path=path.parent,
            ) from error
        raise
    path.chmod(0o600)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def _qcow2_bytes(fd: int) -> int:
    """Virtual size of a qcow2 image: big-endian at byte 24 (docs/interop/qcow2.txt)."""
    return int.from_bytes(os.pread(fd, 8, 24), "big")
