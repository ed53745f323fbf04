"""Directories whose content is not to be trusted, opened step by step and never left.

Every path is resolved by the kernel below a directory that is open (`openat2`): no symbolic link is
followed, no other file system entered. Paths are bytes, relative, without `.` and `..`; that they
are shorter than PATH_MAX bounds how deep anything goes. Sources: openat2(2), renameat2(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator

_SYS_OPENAT2 = 437
_SYS_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 1, 2, 4, 8
_RESOLVE = _NO_XDEV | _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH
NOREPLACE, EXCHANGE = 1, 2
PATH_LIMIT = 4000

_libc = ctypes.CDLL(None, use_errno=True)


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(root: int, path: bytes, flags: int, mode: int = 0) -> int:
    """A descriptor of `path` below the directory `root`; the directory itself if it is empty.

    Raises:
        OSError: as open(2); ELOOP or EXDEV if the path would leave.
    """
    how = _How(flags | os.O_CLOEXEC, mode, _RESOLVE)
    while True:
        fd = int(
            _libc.syscall(
                ctypes.c_long(_SYS_OPENAT2),
                ctypes.c_int(root),
                path or b".",
                ctypes.byref(how),
                ctypes.c_size_t(ctypes.sizeof(how)),
            )
        )
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        # EAGAIN: a rename or mount raced with the walk.
        if number not in (errno.EAGAIN, errno.EINTR):
            raise OSError(number, os.strerror(number), os.fsdecode(path))


def rename(directory: int, old: bytes, new: bytes, flags: int) -> None:
    """renameat2(2) within one directory.

    Raises:
        OSError: as renameat2(2).
    """
    number = ctypes.c_long(_SYS_RENAMEAT2[os.uname().machine])
    place = ctypes.c_int(directory)
    if _libc.syscall(number, place, old, place, new, ctypes.c_uint(flags)) != 0:
        failed = ctypes.get_errno()
        raise OSError(failed, os.strerror(failed), os.fsdecode(new))


def entries(root: int, path: bytes, *, ours: bool = False) -> list[tuple[bytes, os.stat_result]]:
    """Name and state of everything in the directory `path`, by name; links are not followed.

    Args:
        ours: Whether a directory that its own mode keeps us out of is opened up first.

    Raises:
        OSError: it is none, or cannot be read.
    """
    try:
        fd = open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        if not ours:
            raise
        place = open_beneath(root, path, os.O_PATH | os.O_DIRECTORY)
        try:
            os.chmod(f"/proc/self/fd/{place}", os.fstat(place).st_mode & 0o7777 | stat.S_IRWXU)
        finally:
            os.close(place)
        fd = open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)
    found = []
    try:
        with os.scandir(fd) as listed:
            for entry in listed:
                try:
                    found.append((os.fsencode(entry.name), entry.stat(follow_symlinks=False)))
                except FileNotFoundError:  # just removed
                    continue
    finally:
        os.close(fd)
    return sorted(found, key=lambda each: each[0])


def state(root: int, path: bytes) -> os.stat_result | None:
    """What is at `path`, links not followed; None if there is nothing, or no way there."""
    try:
        fd = open_beneath(root, path, os.O_PATH | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        # A link on the way, or another file system: it is not in this directory.
        if error.errno in (errno.ELOOP, errno.EXDEV):
            return None
        raise
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def read_link(root: int, path: bytes) -> bytes:
    """The target of a symbolic link."""
    fd = open_beneath(root, path, os.O_PATH | os.O_NOFOLLOW)
    try:
        return os.readlink(b"", dir_fd=fd)
    finally:
        os.close(fd)


def walk(root: int, *, ours: bool = False) -> Iterator[tuple[bytes, os.stat_result]]:
    """Everything below `root`, a directory before what is in it; `ours` as for `entries`.

    Raises:
        OSError: it cannot be read; ENAMETOOLONG if it is nested too deep.
    """
    waiting = [b""]
    while waiting:
        directory = waiting.pop()
        for name, found in present(root, directory, ours=ours):
            path = join(directory, name)
            yield path, found
            if stat.S_ISDIR(found.st_mode):
                waiting.append(path)


def present(root: int, path: bytes, *, ours: bool = False) -> list[tuple[bytes, os.stat_result]]:
    """`entries`, or nothing if there is no directory at that path (any more), or it lies elsewhere."""
    try:
        return entries(root, path, ours=ours)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
            return []
        raise


def join(directory: bytes, name: bytes) -> bytes:
    """The path of `name` in `directory`.

    Raises:
        OSError: ENAMETOOLONG.
    """
    path = directory + b"/" + name if directory else name
    if len(path) > PATH_LIMIT:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fsdecode(path[:80]))
    return path


def used_bytes(root: int, least: int = 4096) -> int:
    """What everything below `root` takes of the disk, each entry `least` bytes or more.

    Raises:
        OSError: it cannot be read, or is nested too deep to be measured.
    """
    seen: set[int] = set()
    total = 0
    for _, found in walk(root, ours=True):
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            if found.st_ino in seen:
                continue
            seen.add(found.st_ino)
        total += max(least, found.st_blocks * 512)
    return total
