"""Writable disks: a private qcow2 layer in the box's directory above a read-only base image."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from services.common import process
from services.hypervisor.model import Disk
from services.hypervisor.programs import Programs
from services.hypervisor.record import full_disk

_MIB = 1 << 20
EXTRA_MIB = 1024
_FICLONE = 0x40049409  # linux/fs.h
_CREATE_SECONDS = 60.0
_NO_SPACE = ("No space left on device", "Disk quota exceeded")


def overlay_bytes(base_bytes: int, disk_mib: int) -> int:
    """Length of the writable disk: never shorter than its base, whose file system it continues."""
    wanted = disk_mib * _MIB if disk_mib else base_bytes + EXTRA_MIB * _MIB
    return -(-max(base_bytes, wanted) // _MIB) * _MIB


async def make_overlay(programs: Programs, disk: Disk, base_fd: int, disk_mib: int, path: Path) -> int:
    """Make a box's private layer above a base image at `path`; a descriptor of it for reading and writing.

    Raises:
        Exhausted: the host's disk is full; nothing is left at `path`.
    """
    base = os.fstat(base_fd).st_size if disk.format == "raw" else _qcow2_bytes(base_fd)
    return await make_layer(programs, overlay_bytes(base, disk_mib), path)


async def make_layer(programs: Programs, length: int, path: Path) -> int:
    """Make an empty layer of `length` bytes at `path`; a descriptor of it for reading and writing.

    The image names no backing file: the machine's command line does, by descriptor.

    Raises:
        Exhausted: the host's disk is full; nothing is left at `path`.
    """
    argv: list[str | os.PathLike[str]] = [programs.image, "create", "-q", "-f", "qcow2"]
    argv += ["-o", "lazy_refcounts=on", path, str(length)]
    try:
        with filling(path.parent):
            await process.run(argv, seconds=_CREATE_SECONDS)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    path.chmod(0o600)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


@contextlib.contextmanager
def filling(directory: Path) -> Iterator[None]:
    """Say so if a program fails because the disk of `directory` is full.

    Raises:
        Exhausted: it is.
    """
    try:
        yield
    except process.CommandFailed as error:
        if any(text in error.message for text in _NO_SPACE):
            raise full_disk(OSError(errno.ENOSPC, error.message), directory) from error
        raise


def _qcow2_bytes(fd: int) -> int:
    """Virtual size of a qcow2 image: big-endian at byte 24 (docs/interop/qcow2.txt)."""
    return int.from_bytes(os.pread(fd, 8, 24), "big")


def clone_all(source: Path, target: Path) -> None:
    """Copy the private layers of a machine's disks, which must not be written to meanwhile. Blocks.

    Raises:
        Exhausted: the disk is full.
    """
    for path in source.glob("*.qcow2"):
        try:
            clone(path, target / path.name)
        except OSError as error:
            raise full_disk(error, target) from error


def clone(source: Path, target: Path) -> None:
    """Copy a layer, sharing its blocks where the file system can, and keeping its holes. Blocks.

    Raises:
        OSError: as open(2), write(2); nothing is left at `target`.
    """
    mode = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with source.open("rb") as old, os.fdopen(os.open(target, mode, 0o600), "wb") as new:
        try:
            try:
                fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            except OSError:
                _copy_data(old.fileno(), new.fileno())
        except BaseException:
            target.unlink()
            raise


def _copy_data(old: int, new: int) -> None:
    end = os.fstat(old).st_size
    os.ftruncate(new, end)
    at = 0
    while at < end:
        try:
            at = os.lseek(old, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        stop = os.lseek(old, at, os.SEEK_HOLE)
        while at < stop:
            piece = os.pread(old, min(_MIB, stop - at), at)
            at += os.pwrite(new, piece, at)
