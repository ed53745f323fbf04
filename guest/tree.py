"""Whole trees as tar archives, in and out, in bounded memory; run in a thread.

`tarfile` is loaded at the first use. It is only asked for headers: what is opened and
made is decided here, relative to directory descriptors and without following links.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Any, Protocol

from guest.errors import AgentError, Code, denied, exhausted, from_os_error, invalid
from guest.root import Root, reopen

if TYPE_CHECKING:
    import tarfile

_DEEPEST = 200
_BLOCK = 262144
_RECORD = 512


class Sink(Protocol):
    """What an archive is written to."""

    def write(self, data: bytes, /) -> object:
        """Take all of `data`."""


class Source(Protocol):
    """What an archive is read from."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""


class _Counted:
    """A sink with a limit."""

    def __init__(self, sink: Sink, limit: int, path: str) -> None:
        self._sink = sink
        self._left = limit
        self._limit = limit
        self._path = path

    def write(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise exhausted(
                f"the archive of {self._path} is longer than {self._limit} bytes",
                reason="ARCHIVE_TOO_LARGE", path=self._path, max_bytes=self._limit,
            )  # fmt: skip
        self._sink.write(data)


def pack(root: Root, path: str, sink: Sink, limit: int) -> None:
    """Write the tree at `path` to `sink` as a PAX archive of at most `limit` bytes.

    Sockets and devices are left out, and so are kernel file systems below `path`.

    Raises:
        AgentError: too long, or `path` is neither a directory nor a file.
        OSError: something cannot be read.
    """
    import tarfile

    out = _Counted(sink, limit, path)
    found = root.open(path, os.O_PATH)
    try:
        kind = stat.S_IFMT(os.fstat(found).st_mode)
        if kind not in (stat.S_IFDIR, stat.S_IFREG):
            raise AgentError(
                Code.FAILED_PRECONDITION, "NOT_A_TREE", f"{path} is neither a directory nor a file", path=path
            )
        fd = reopen(found, os.O_RDONLY)
    finally:
        os.close(found)
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            _pack_directory(tarfile, out, fd, "", _kernel_devices(), 0)
        else:
            _pack_file(tarfile, out, fd, status, path.rstrip("/").rpartition("/")[2])
    finally:
        os.close(fd)
    out.write(bytes(2 * _RECORD))


def _pack_directory(tar: Any, out: _Counted, fd: int, prefix: str, skip: frozenset[int], depth: int) -> None:
    if depth > _DEEPEST:
        raise AgentError(Code.FAILED_PRECONDITION, "TOO_DEEP", f"{prefix} is nested deeper than {_DEEPEST}")
    for name in sorted(os.listdir(fd)):
        try:
            status = os.lstat(name, dir_fd=fd)
        except FileNotFoundError:
            continue
        kind = stat.S_IFMT(status.st_mode)
        full = f"{prefix}{name}"
        if kind == stat.S_IFDIR:
            if status.st_dev in skip:
                continue
            child = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                out.write(_header(tar, full, status, tar.DIRTYPE))
                _pack_directory(tar, out, child, f"{full}/", skip, depth + 1)
            finally:
                os.close(child)
        elif kind == stat.S_IFREG:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                child = os.open(name, flags, dir_fd=fd)
            except FileNotFoundError:
                continue
            try:
                _pack_file(tar, out, child, os.fstat(child), full)
            finally:
                os.close(child)
        elif kind == stat.S_IFLNK:
            out.write(_header(tar, full, status, tar.SYMTYPE, os.readlink(name, dir_fd=fd)))
        elif kind == stat.S_IFIFO:
            out.write(_header(tar, full, status, tar.FIFOTYPE))


def _pack_file(tar: Any, out: _Counted, fd: int, status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):  # exchanged between lstat and open
        return
    size = left = status.st_size
    out.write(_header(tar, name, status, tar.REGTYPE))
    while left:
        data = os.read(fd, min(_BLOCK, left))
        if not data:
            data = bytes(min(_BLOCK, left))  # it shrank while it was read; the header's promise stands
        left -= len(data)
        out.write(data)
    if size % _RECORD:
        out.write(bytes(_RECORD - size % _RECORD))


def _header(tar: Any, name: str, status: os.stat_result, kind: bytes, link: str = "") -> bytes:
    info = tar.TarInfo(name)
    info.type = kind
    info.mode = stat.S_IMODE(status.st_mode)
    info.uid, info.gid = status.st_uid, status.st_gid
    info.mtime = status.st_mtime
    info.linkname = link
    info.size = status.st_size if kind == tar.REGTYPE else 0
    header: bytes = info.tobuf(tar.PAX_FORMAT, "utf-8", "surrogateescape")
    return header


def _kernel_devices() -> frozenset[int]:
    devices = set()
    for path in ("/proc", "/sys", "/dev", "/dev/pts", "/sys/fs/cgroup"):
        with contextlib.suppress(OSError):
            devices.add(os.stat(path).st_dev)
    devices.discard(os.stat("/").st_dev)
    return frozenset(devices)


def unpack(root: Root, path: str, source: Source, uid: int, gid: int) -> tuple[int, int]:
    """Unpack the archive from `source` below the directory `path`, all owned by uid and gid.

    Existing files are replaced, existing directories are kept. An entry whose name is
    absolute, holds `..` or leads through a symbolic link is refused; set-id bits are dropped.

    Returns:
        How many entries, and the sum of the lengths of the files.

    Raises:
        AgentError: the archive is malformed or an entry would leave the directory.
        OSError: something cannot be written.
    """
    import tarfile

    root.make_directories(path, uid, gid, 0o755)
    base = root.open(path, os.O_RDONLY | os.O_DIRECTORY)
    entries = size = 0
    try:
        with tarfile.open(fileobj=source, mode="r|", errorlevel=2) as archive:  # type: ignore[call-overload]
            for info in archive:
                archive.members = []  # it would remember every entry
                _place(base, path, archive, info, uid, gid)
                entries += 1
                size += info.size if info.isreg() else 0
    except tarfile.TarError as error:
        raise invalid(
            f"{path}: the archive is malformed: {error}", reason="BAD_ARCHIVE", path=path
        ) from error
    except (EOFError, UnicodeDecodeError, ValueError) as error:
        raise invalid(
            f"{path}: the archive is malformed: {error}", reason="BAD_ARCHIVE", path=path
        ) from error
    finally:
        os.close(base)
    return entries, size


def _place(base: int, path: str, archive: tarfile.TarFile, info: tarfile.TarInfo, uid: int, gid: int) -> None:
    parts = _parts(info.name, path)
    mode = info.mode & 0o1777
    shown = f"{path.rstrip('/')}/{'/'.join(parts)}"
    if not parts:
        if not info.isdir():
            raise invalid(f"{path}: an entry without a name", reason="BAD_ARCHIVE", path=path)
        return
    parent = _descend(base, parts[:-1], shown, uid, gid)
    name = parts[-1]
    try:
        if info.isdir():
            _make_directory(parent, name, mode, uid, gid, shown)
            return
        if info.islnk():
            _link(base, parent, name, _parts(info.linkname, path), shown)
            return
        _clear(parent, name, shown)
        if info.issym():
            os.symlink(info.linkname, name, dir_fd=parent)
            _own(parent, name, uid, gid)
        elif info.isfifo():
            os.mkfifo(name, mode & 0o777, dir_fd=parent)
            _own(parent, name, uid, gid)
        elif info.isreg():
            _write_file(archive, info, parent, name, mode, uid, gid)
        else:
            raise denied(
                f"{shown}: devices and unknown kinds are not unpacked", reason="UNSAFE_ENTRY", path=shown
            )
        os.utime(name, (info.mtime, info.mtime), dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        raise from_os_error(error, shown) from error
    finally:
        if parent != base:
            os.close(parent)


def _parts(name: str, path: str) -> list[str]:
    if name.startswith("/") or "\0" in name:
        raise denied(
            f"{path}: the archive names {name!r}, which is absolute", reason="UNSAFE_ENTRY", path=path
        )
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise denied(
            f"{path}: the archive names {name!r}, which would leave it", reason="UNSAFE_ENTRY", path=path
        )
    return parts


def _descend(base: int, parts: list[str], shown: str, uid: int, gid: int) -> int:
    """Open the directory below `base`, making what is missing; no link is followed."""
    current = base
    for part in parts:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=current)
                _own(current, part, uid, gid)
            deeper = os.open(
                part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current
            )
        except NotADirectoryError:
            raise denied(
                f"{shown} leads through {part!r}, which is no directory", reason="UNSAFE_ENTRY", path=shown
            ) from None
        except OSError as error:
            if error.errno == 40:  # ELOOP: a link
                raise denied(
                    f"{shown} leads through the link {part!r}", reason="UNSAFE_ENTRY", path=shown
                ) from None
            raise from_os_error(error, shown) from error
        finally:
            if current != base:
                os.close(current)
        current = deeper
    return current


def _make_directory(parent: int, name: str, mode: int, uid: int, gid: int, shown: str) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
            raise denied(f"{shown} exists and is no directory", reason="UNSAFE_ENTRY", path=shown) from None
        return
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if os.geteuid() == 0:
            os.fchown(fd, uid, gid)
        # Whatever the archive says: entries below it are still to come, as root or not.
        os.fchmod(fd, mode | 0o700)
    finally:
        os.close(fd)


def _link(base: int, parent: int, name: str, target: list[str], shown: str) -> None:
    if not target:
        raise denied(f"{shown}: a hard link to nothing", reason="UNSAFE_ENTRY", path=shown)
    home = base
    try:
        for part in target[:-1]:
            deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=home)
            if home != base:
                os.close(home)
            home = deeper
        _clear(parent, name, shown)
        os.link(target[-1], name, src_dir_fd=home, dst_dir_fd=parent, follow_symlinks=False)
    finally:
        if home != base:
            os.close(home)


def _clear(parent: int, name: str, shown: str) -> None:
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        raise AgentError(
            Code.FAILED_PRECONDITION,
            "IS_A_DIRECTORY",
            f"{shown} is a directory and the archive has a file there",
            path=shown,
        ) from None


def _write_file(
    archive: tarfile.TarFile, info: tarfile.TarInfo, parent: int, name: str, mode: int, uid: int, gid: int
) -> None:
    content = archive.extractfile(info)
    assert content is not None
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=parent)
    try:
        left = info.size
        while left:
            data = content.read(min(_BLOCK, left))
            if not data:
                raise EOFError("it ends in the middle of a file")
            left -= len(data)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        if os.geteuid() == 0:
            os.fchown(fd, uid, gid)
        os.fchmod(fd, mode & 0o777)
    finally:
        os.close(fd)


def _own(parent: int, name: str, uid: int, gid: int) -> None:
    if os.geteuid() == 0:
        os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
