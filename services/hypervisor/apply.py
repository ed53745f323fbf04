"""Brings what a box has changed to the host's directory, one path at a time, each whole or not at all.

Content and names are the box's and may be hostile; the host's directory is somebody's who works in
it. So every path is opened beneath that directory without following a link, a file is complete and
on disk before it takes the old one's place, and what it replaces is exactly what was compared, or is
put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import secrets
import shutil
from collections.abc import Iterable

from services.hypervisor import beneath
from services.hypervisor.changes import Layers
from services.hypervisor.changeset import MODE_BITS, Change, FileType, Kind, open_file

_NEW = b".voidbox-new-"
_CHANGED = "the host's file has been changed just now"


def apply(changes: Iterable[Change], layers: Layers) -> list[Change]:
    """Apply `changes` in their order; the result tells in `impossible` which ones could not be.

    What was applied is noted in `layers`.
    """
    done = []
    for change in changes:
        try:
            _apply(change, layers)
        except OSError as error:
            why = error.strerror or str(error)
            change = dataclasses.replace(change, impossible=f"it cannot be applied: {why}")
        done.append(change)
    return done


def _apply(change: Change, layers: Layers) -> None:
    directory, _, name = change.path.rpartition(b"/")
    parent = beneath.open_beneath(layers.lower, directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if change.kind is Kind.DELETED:
            _delete(parent, name, change)
            layers.applied.pop(change.path, None)
            return
        owner = os.fstat(layers.lower)
        if change.type is FileType.DIRECTORY:
            _make_directory(parent, name, change, owner)
            return
        new = _NEW + secrets.token_hex(8).encode()
        try:
            if change.type is FileType.FILE:
                _copy(layers.upper, change, parent, new, owner)
            else:
                os.symlink(change.target, new, dir_fd=parent)
                if os.geteuid() == 0:
                    os.chown(new, owner.st_uid, owner.st_gid, dir_fd=parent, follow_symlinks=False)
            _put(parent, new, name, change)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=parent)
        info = os.stat(name, dir_fd=parent, follow_symlinks=False)
        layers.applied[change.path] = (info.st_ctime_ns, info.st_ino)
    finally:
        os.close(parent)


def _delete(parent: int, name: bytes, change: Change) -> None:
    if change.type is FileType.DIRECTORY:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(name, dir_fd=parent)
        return
    assert change.before is not None
    # Under another name nobody changes it by its own; then it is looked at.
    aside = _NEW + secrets.token_hex(8).encode()
    try:
        beneath.rename(parent, name, aside, beneath.NOREPLACE)
    except FileNotFoundError:
        return
    if not _is(parent, aside, change.before):
        try:
            beneath.rename(parent, aside, name, beneath.NOREPLACE)
        except FileExistsError:  # saved once more, which is newer than this one
            os.unlink(aside, dir_fd=parent)
        raise OSError(errno.EBUSY, _CHANGED)
    os.unlink(aside, dir_fd=parent)


def _make_directory(parent: int, name: bytes, change: Change, owner: os.stat_result) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
        if os.geteuid() == 0:
            os.chown(name, owner.st_uid, owner.st_gid, dir_fd=parent, follow_symlinks=False)
    fd = beneath.open_beneath(parent, name, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fchmod(fd, change.mode)
    finally:
        os.close(fd)


def _copy(upper: int, change: Change, parent: int, new: bytes, owner: os.stat_result) -> None:
    """The file of the box as `new` in the host's directory, complete and on disk."""
    with open_file(upper, change.path, ours=True) as source:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600,
                     dir_fd=parent)  # fmt: skip
        with os.fdopen(fd, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            if os.geteuid() == 0:
                os.fchown(target.fileno(), owner.st_uid, owner.st_gid)
            os.fchmod(target.fileno(), change.mode & MODE_BITS)
            times = os.fstat(source.fileno())
            os.utime(target.fileno(), ns=(times.st_atime_ns, times.st_mtime_ns))
            os.fsync(target.fileno())


def _put(parent: int, new: bytes, name: bytes, change: Change) -> None:
    """Have `new` take the place of what was compared, and of nothing else."""
    if change.before is None:
        beneath.rename(parent, new, name, beneath.NOREPLACE)
        return
    ours = _inode(parent, new)
    try:
        beneath.rename(parent, new, name, beneath.EXCHANGE)
    except FileNotFoundError:
        raise OSError(errno.EBUSY, _CHANGED) from None
    if not _is(parent, new, change.before):
        _put_back(parent, new, name, ours)
        raise OSError(errno.EBUSY, _CHANGED)


def _put_back(parent: int, held: bytes, name: bytes, placed: int) -> None:
    """Have `name` be again what its user has saved last; `placed` is the inode that we have put there.

    What is `held` is the user's. If something else than what we had put there comes back for it, the user
    has saved once more in between, so that has to take the place instead, and so on.
    """
    while True:
        giving = _inode(parent, held)
        try:
            beneath.rename(parent, held, name, beneath.EXCHANGE)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                beneath.rename(parent, held, name, beneath.NOREPLACE)
                return
            continue
        if _inode(parent, held) == placed:
            return
        placed = giving


def _inode(parent: int, name: bytes) -> int:
    return os.stat(name, dir_fd=parent, follow_symlinks=False).st_ino


def _is(parent: int, name: bytes, expected: os.stat_result) -> bool:
    """Whether this is what was compared; a rename changes the ctime, and nothing else of a file."""
    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    fields = ("st_ino", "st_dev", "st_size", "st_mtime_ns", "st_mode")
    return all(getattr(found, each) == getattr(expected, each) for each in fields)
