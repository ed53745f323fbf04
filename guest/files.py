"""What the file calls do, blocking, on a `Root`; run in a thread."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import NamedTuple

from guest.errors import AgentError, Code, from_os_error, invalid
from guest.root import Root, check, make_directory, reopen

_DEEPEST = 200  # one open descriptor a level


class Entry(NamedTuple):
    """A file as `lstat` and `readlink` see it."""

    path: str
    status: os.stat_result
    link: str


class Owner(NamedTuple):
    """Who a file belongs to."""

    uid: int
    gid: int


def open_regular(root: Root, path: str, flags: int = os.O_RDONLY, mode: int = 0) -> int:
    """Open a regular file.

    Raises:
        AgentError: it is something else.
    """
    if flags & os.O_CREAT:
        return root.open(path, flags, mode)
    fd = root.open(path, os.O_PATH)
    try:
        kind = os.fstat(fd).st_mode
        if stat.S_ISREG(kind):
            return reopen(fd, flags)
    finally:
        os.close(fd)
    if stat.S_ISDIR(kind):
        raise AgentError(Code.FAILED_PRECONDITION, "IS_A_DIRECTORY", f"{path} is a directory", path=path)
    raise AgentError(Code.FAILED_PRECONDITION, "NOT_A_FILE", f"{path} is not a regular file", path=path)


class Writer:
    """A file that is being written: whole at `commit`, or in place if there is an offset.

    A context manager: what was not committed leaves no trace (in place: what was written stays).

    Args:
        root: Where.
        path: The file.
        mode: Permission bits; None keeps those of the file that is replaced, or 0644.
        owner: Owner; None keeps that of the file that is replaced, or `default`.
        default: Owner of a file that replaces nothing.
        offset: Where to write in the existing file; -1 appends; None replaces it.
    """

    def __init__(
        self,
        root: Root,
        path: str,
        *,
        mode: int | None,
        owner: Owner | None,
        default: Owner,
        offset: int | None,
    ) -> None:
        self.path = path
        self.size = 0
        self._mode = 0o644 if mode is None else mode
        self._owner = owner or default
        self._parent = -1
        self._temporary = ""
        self._fd = -1
        if offset is not None:
            self._open_in_place(root, path, offset)
            return
        self._parent, self._name = root.open_parent(path)
        try:
            self._take_over(mode, owner)
            # A name of its own length: a long one plus a suffix might be too long.
            self._temporary = f".voidbox-{os.urandom(8).hex()}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._temporary, flags, 0o600, dir_fd=self._parent)
        except BaseException:
            os.close(self._parent)
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; what was not committed is gone. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._parent)
            self._temporary = ""
        if self._parent >= 0:
            os.close(self._parent)
            self._parent = -1

    def write(self, data: bytes | bytearray) -> None:
        """Write the next bytes."""
        view = memoryview(data)
        while view:
            count = os.write(self._fd, view)
            self.size += count
            view = view[count:]

    def commit(self) -> None:
        """Make the file appear."""
        if not self._temporary:
            return
        if os.geteuid() == 0:
            os.fchown(self._fd, *self._owner)
        os.fchmod(self._fd, self._mode)
        os.fsync(self._fd)
        os.replace(self._temporary, self._name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        self._temporary = ""

    def _open_in_place(self, root: Root, path: str, offset: int) -> None:
        if offset < -1:
            raise invalid(f"offset {offset}", path=path)
        existed = True
        try:
            self._fd = open_regular(root, path, os.O_WRONLY | (os.O_APPEND if offset < 0 else 0))
        except FileNotFoundError:
            if offset >= 0:
                raise
            existed = False
            self._fd = open_regular(root, path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if not existed:
                if os.geteuid() == 0:
                    os.fchown(self._fd, *self._owner)
                os.fchmod(self._fd, self._mode)
            elif offset > 0:
                os.lseek(self._fd, offset, os.SEEK_SET)
        except BaseException:
            os.close(self._fd)
            self._fd = -1
            raise

    def _take_over(self, mode: int | None, owner: Owner | None) -> None:
        try:
            old = os.lstat(self._name, dir_fd=self._parent)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(old.st_mode):
            raise AgentError(
                Code.FAILED_PRECONDITION, "IS_A_DIRECTORY", f"{self.path} is a directory", path=self.path
            )
        if stat.S_ISREG(old.st_mode):
            if mode is None:
                self._mode = stat.S_IMODE(old.st_mode) & 0o777
            if owner is None:
                self._owner = Owner(old.st_uid, old.st_gid)


def describe(root: Root, path: str) -> Entry:
    """What is at `path`; a final symbolic link is described, not followed."""
    check(path)
    if not path.strip("/"):
        return Entry(path, os.fstat(root.fd), "")
    if path.rstrip("/").rpartition("/")[2] in (".", ".."):
        fd = root.open(path, os.O_PATH)
        try:
            return Entry(path, os.fstat(fd), "")
        finally:
            os.close(fd)
    parent, name = root.open_parent(path)
    try:
        return _entry(parent, name, path)
    finally:
        os.close(parent)


def list_directory(root: Root, path: str, after: str, limit: int) -> tuple[list[Entry], bool]:
    """Up to `limit` entries of a directory with names after `after`, and whether there are more."""
    fd = root.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        names = sorted(name for name in os.listdir(fd) if name > after)
        entries = []
        for name in names[:limit]:
            with contextlib.suppress(FileNotFoundError):  # gone since
                entries.append(_entry(fd, name, name))
    finally:
        os.close(fd)
    return entries, len(names) > limit


def _entry(parent: int, name: str, shown: str) -> Entry:
    status = os.lstat(name, dir_fd=parent)
    link = ""
    if stat.S_ISLNK(status.st_mode):
        link = os.readlink(name, dir_fd=parent)
    return Entry(shown, status, link)


def make(root: Root, path: str, *, mode: int, owner: Owner, parents: bool) -> None:
    """Make a directory."""
    if parents:
        root.make_directories(path, *owner, mode)
        return
    parent, name = root.open_parent(path)
    try:
        if not make_directory(parent, name, *owner, mode):
            raise AgentError(Code.ALREADY_EXISTS, "ALREADY_EXISTS", f"{path} exists", path=path)
    finally:
        os.close(parent)


def remove(root: Root, path: str, *, recursive: bool) -> None:
    """Remove a file, an empty directory, or a tree."""
    parent, name = root.open_parent(path)
    try:
        status = os.lstat(name, dir_fd=parent)
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(name, dir_fd=parent)
        elif recursive:
            _remove_tree(parent, name, os.fstat(parent).st_dev, path, 0)
        else:
            os.rmdir(name, dir_fd=parent)
    finally:
        os.close(parent)


def _remove_tree(parent: int, name: str, device: int, shown: str, depth: int) -> None:
    """Remove a directory and all below it, staying on one file system: a mount is not ours to empty."""
    if depth > _DEEPEST:
        raise AgentError(
            Code.FAILED_PRECONDITION, "TOO_DEEP", f"{shown} is nested deeper than {_DEEPEST}", path=shown
        )
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if os.fstat(fd).st_dev != device:
            raise AgentError(Code.FAILED_PRECONDITION, "BUSY", f"{shown} is a mount point", path=shown)
        for child in os.listdir(fd):
            try:
                os.unlink(child, dir_fd=fd)
            except IsADirectoryError:
                _remove_tree(fd, child, device, f"{shown}/{child}", depth + 1)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def rename(root: Root, old: str, new: str) -> None:
    """Rename a file or directory."""
    old_parent, old_name = root.open_parent(old)
    try:
        new_parent, new_name = root.open_parent(new)
        try:
            os.rename(old_name, new_name, src_dir_fd=old_parent, dst_dir_fd=new_parent)
        except OSError as error:
            if error.errno == 18:  # EXDEV here is two file systems, not an escape
                raise AgentError(
                    Code.FAILED_PRECONDITION,
                    "OTHER_FILE_SYSTEM",
                    f"{old} and {new} are on different file systems",
                ) from error
            raise from_os_error(error, f"{old} to {new}") from error
        finally:
            os.close(new_parent)
    finally:
        os.close(old_parent)
