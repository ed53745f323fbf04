"""Files and directory trees as tar archives: packed from ours, unpacked from a box.

An archive from a box is hostile: its names are checked here, it is unpacked relative to
directory descriptors that never follow a link, and no header is believed before its
length is known to be small. Format: POSIX.1-2001 pax and the older ustar and GNU forms
(tar(5)), without sparse files.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import Corrupt, Denied, InvalidInput, WrongState

# Of a chunk in the protocol.
CHUNK_BYTES = 64 * 1024
BLOCK = tarfile.BLOCKSIZE
# Long names and pax attributes; a path is at most 4 KiB (PATH_MAX), an attribute value 64 KiB.
MAX_HEADER_BYTES = 256 * 1024
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def read_file(path: Path) -> Iterator[bytes]:
    """A file's content, piece by piece.

    Raises:
        InvalidInput: it cannot be read or is no regular file.
    """
    try:
        # Not blocking on a FIFO that has no writer.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidInput(f"{path} is neither a file nor a directory", reason="BAD_FILE", path=path)
            while data := file.read(CHUNK_BYTES):
                yield data
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}", reason="BAD_FILE", path=path) from error


def pack(root: Path) -> Iterator[bytes]:
    """A pax archive of what is below the directory `root`, in name order, owned by nobody.

    Two packings of the same tree are equal, so they have the same digest.

    Raises:
        InvalidInput: something cannot be read, changes meanwhile, or is a device, FIFO or socket.
    """
    pending = b""
    for piece in _entries(root):
        pending += piece
        if len(pending) >= CHUNK_BYTES:
            yield pending
            pending = b""
    yield pending + bytes(2 * BLOCK)


def _entries(root: Path) -> Iterator[bytes]:
    try:
        yield from _walk(root, "")
    except OSError as error:
        raise InvalidInput(f"{error.filename or root}: {error.strerror}", reason="BAD_FILE") from error


def _walk(directory: Path, prefix: str) -> Iterator[bytes]:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        path = Path(entry.path)
        before = entry.stat(follow_symlinks=False)
        info = tarfile.TarInfo(prefix + entry.name)
        info.mode = stat.S_IMODE(before.st_mode) & 0o777
        info.mtime = int(before.st_mtime)
        if stat.S_ISDIR(before.st_mode):
            info.type = tarfile.DIRTYPE
            yield _header(info, path)
            yield from _walk(path, f"{info.name}/")
        elif stat.S_ISLNK(before.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
            yield _header(info, path)
        elif stat.S_ISREG(before.st_mode):
            info.size = before.st_size
            yield _header(info, path)
            yield from _content(path, info.size)
        else:
            raise InvalidInput(
                f"{path} is a device, FIFO or socket, which cannot be copied; leave it out",
                reason="BAD_FILE",
                path=path,
            )


def _header(info: tarfile.TarInfo, path: Path) -> bytes:
    try:
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{path!r}: the name is not UTF-8; rename it", reason="BAD_FILE") from error


def _content(path: Path, size: int) -> Iterator[bytes]:
    left = size
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb", buffering=0) as file:
        while left:
            data = file.read(min(CHUNK_BYTES, left))
            if not data:
                raise InvalidInput(f"{path} became shorter while it was read", reason="BAD_FILE", path=path)
            left -= len(data)
            yield data
    if size % BLOCK:
        yield bytes(BLOCK - size % BLOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """What `unpack` wrote."""

    entries: int
    size_bytes: int


async def unpack(chunks: AsyncIterator[bytes], target: Path) -> Unpacked:
    """Unpack an archive that is not to be trusted below the directory `target`.

    Files get our owner and at most mode 0777; existing files are replaced, directories kept.

    Raises:
        Denied: a name, link or file type that would reach outside `target`.
        Corrupt: it is no complete tar archive.
        WrongState: something in the way cannot be replaced, or the disk is full.
    """
    reader = _Reader(chunks)
    entries = size = 0
    try:
        top = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise WrongState(f"{target}: {error.strerror}", reason="BAD_TARGET", path=target) from error
    try:
        async for info in _members(reader):
            try:
                size += await _extract(info, reader, top, target)
            except OSError as error:
                raise WrongState(
                    f"cannot write {target}/{info.name}: {error.strerror}",
                    reason="WRITE_FAILED",
                    path=info.name,
                ) from error
            entries += 1
    finally:
        os.close(top)
    return Unpacked(entries=entries, size_bytes=size)


class _Reader:
    """Exact numbers of bytes out of pieces of any length."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    async def some(self, limit: int) -> bytes:
        """1 to `limit` bytes; none only at the end."""
        while not self._rest:
            try:
                self._rest = await anext(self._chunks)
            except StopAsyncIteration:
                return b""
        data, self._rest = self._rest[:limit], self._rest[limit:]
        return data

    async def exactly(self, count: int) -> bytes:
        """`count` bytes, which the caller has checked to be few."""
        parts = []
        while count:
            data = await self.some(count)
            if not data:
                raise Corrupt("the archive ends in the middle of an entry", reason="BAD_ARCHIVE")
            parts.append(data)
            count -= len(data)
        return b"".join(parts)

    async def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        while count:
            data = await self.some(min(count, CHUNK_BYTES))
            if not data:
                raise Corrupt("the archive ends in the middle of an entry", reason="BAD_ARCHIVE")
            count -= len(data)


async def _members(reader: _Reader) -> AsyncIterator[tarfile.TarInfo]:
    """The entries; the consumer reads the content of regular files, padding included."""
    name = link = ""
    size: int | None = None
    while True:
        block = await reader.exactly(BLOCK)
        if not any(block):
            break
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise Corrupt(f"the archive has a malformed header: {error}", reason="BAD_ARCHIVE") from error
        if info.size < 0:
            raise Corrupt("the archive has an entry of negative length", reason="BAD_ARCHIVE")
        if info.type in (
            tarfile.XHDTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XGLTYPE,
        ):
            if info.size > MAX_HEADER_BYTES:
                raise Corrupt(f"the archive has a header of {info.size} bytes", reason="BAD_ARCHIVE")
            body = await reader.exactly(info.size)
            await reader.skip(-info.size % BLOCK)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = body.rstrip(b"\0").decode(errors="surrogateescape")
            elif info.type == tarfile.GNUTYPE_LONGLINK:
                link = body.rstrip(b"\0").decode(errors="surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                records = _pax(body)
                name, link = records.get("path", name), records.get("linkpath", link)
                size = int(records["size"]) if records.get("size", "").isdecimal() else size
                if any(key.startswith("GNU.sparse") for key in records):
                    raise Corrupt("the archive has a sparse file", reason="BAD_ARCHIVE")
            continue
        info.name, info.linkname = name or info.name, link or info.linkname
        info.size = info.size if size is None else size
        name, link, size = "", "", None
        yield info


def _pax(body: bytes) -> dict[str, str]:
    """Records "<length> <key>=<value>\\n" (pax(1), "pax Extended Header")."""
    records = {}
    while body:
        digits, _, _ = body.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = body[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if length > len(body) or not equals or not value.endswith(b"\n"):
            raise Corrupt("the archive has a malformed pax header", reason="BAD_ARCHIVE")
        records[key.decode(errors="replace")] = value[:-1].decode(errors="surrogateescape")
        body = body[length:]
    return records


def _parts(name: str) -> list[str]:
    """The components of an entry's name.

    Raises:
        Denied: it is absolute, climbs, or cannot be a file name.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise Denied(
            f"the archive from the box has the entry {name!r}, which would be outside the target",
            reason="PATH_ESCAPES",
            path=name,
        )
    return parts


async def _extract(info: tarfile.TarInfo, reader: _Reader, top: int, target: Path) -> int:
    parts = _parts(info.name)
    if not parts:  # the directory itself
        await reader.skip(0 if info.isdir() else info.size + -info.size % BLOCK)
        return 0
    with _opened(top, parts[:-1]) as parent:
        leaf = parts[-1]
        if info.isdir():
            with contextlib.suppress(FileExistsError):
                os.mkdir(leaf, 0o700, dir_fd=parent)
            fd = os.open(leaf, _DIRECTORY, dir_fd=parent)
            try:
                os.fchmod(fd, (info.mode & 0o777) | 0o700)
            finally:
                os.close(fd)
            return 0
        if info.type not in (
            tarfile.REGTYPE,
            tarfile.AREGTYPE,
            tarfile.CONTTYPE,
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
        ):
            raise Denied(
                f"the archive from the box has {info.name!r} of type {info.type!r}; only files, directories "
                "and links are taken",
                reason="BAD_ENTRY",
                path=info.name,
            )
        with contextlib.suppress(FileNotFoundError):
            os.unlink(leaf, dir_fd=parent)
        if info.issym():
            _check_link(info, parts)
            os.symlink(info.linkname, leaf, dir_fd=parent)
            return 0
        if info.islnk():
            source = _parts(info.linkname)
            with _opened(top, source[:-1]) as directory:
                os.link(source[-1], leaf, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)
            return 0
        await _write(info, reader, leaf, parent)
        return info.size


async def _write(info: tarfile.TarInfo, reader: _Reader, leaf: str, parent: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(leaf, flags, 0o600, dir_fd=parent)
    try:
        left = info.size
        while left:
            data = await reader.some(min(left, CHUNK_BYTES))
            if not data:
                raise Corrupt(f"the archive ends in the middle of {info.name!r}", reason="BAD_ARCHIVE")
            left -= len(data)
            while data:
                data = data[os.write(fd, data) :]
        await reader.skip(-info.size % BLOCK)
        os.fchmod(fd, (info.mode & 0o777) | 0o400)
        if 0 <= info.mtime < 1 << 40:
            os.utime(fd, (info.mtime, info.mtime))
    except BaseException:
        os.unlink(leaf, dir_fd=parent)
        raise
    finally:
        os.close(fd)


def _check_link(info: tarfile.TarInfo, parts: list[str]) -> None:
    """Refuse a symbolic link that points outside: who reads it later would follow it.

    Steps up may only come first, from the link's own directory, which was reached without
    following a link; after another link they could lead anywhere.
    """
    steps = [step for step in info.linkname.split("/") if step not in ("", ".")]
    up = next((at for at, step in enumerate(steps) if step != ".."), len(steps))
    if info.linkname.startswith("/") or up > len(parts) - 1 or ".." in steps[up:] or not info.linkname:
        raise Denied(
            f"the archive from the box has the link {info.name!r} to {info.linkname!r}, "
            "which can lead outside the target",
            reason="PATH_ESCAPES",
            path=info.name,
        )


@contextlib.contextmanager
def _opened(top: int, parts: list[str]) -> Iterator[int]:
    """A directory below `top`, made as needed, reached without following any link."""
    fd = os.dup(top)
    try:
        for part in parts:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=fd)
            inner = os.open(part, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)
