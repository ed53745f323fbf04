"""The files that an image is stored in: a directory, or a tar archive read in place.

Nothing in either is trusted: no link leads out, no FIFO hangs, no number makes us allocate. An
archive is read where it is; only one that is compressed as a whole is first unpacked to a nameless
file, since it has no random access.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import posixpath
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, Final, Protocol, Self, cast

import zstandard

from services.common.errors import Corrupt, Exhausted, InvalidInput, NotFound
from services.imager import tarstream
from services.imager.bytestream import ByteStream, Truncated
from services.imager.cache import disk_errors
from services.imager.limits import Cancel, Limits

_CHUNK: Final = 1 << 20
_MAX_MEMBERS: Final = 100_000  # layers, configurations and their directories of thousands of images
_MAX_LINKS: Final = 8
_MAGICS: Final = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
}


class Files(Protocol):
    """Read-only files by name."""

    place: Path

    def open(self, name: str) -> BinaryIO:
        """The regular file `name`, a relative path made of checked parts.

        Raises:
            NotFound: there is none.
            InvalidInput: it is no regular file.
        """

    def size(self, name: str) -> int:
        """The length of the file `name` in bytes; errors as `open`."""


def read_file(files: Files, name: str, limit: int) -> bytes:
    """A whole small file.

    Raises:
        InvalidInput: it is longer than `limit` bytes.
    """
    with files.open(name) as file:
        parts, left = [], limit + 1
        while left and (data := file.read(left)):
            parts.append(data)
            left -= len(data)
    if not left:
        raise InvalidInput(f"{files.place / name} is longer than {limit} bytes", reason="IMAGE_TOO_LARGE")
    return b"".join(parts)


class DirectoryFiles:
    """Files below a directory, opened by its descriptor; a context manager.

    Raises:
        NotFound: there is no such directory.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._directory = -1

    def __enter__(self) -> Self:
        try:
            self._directory = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound(
                f"{self.place}: {error.strerror}; it must be an OCI layout directory", path=self.place
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._directory)

    def open(self, name: str) -> BinaryIO:
        """As `Files.open`."""
        return _open_regular(name, self.place / name, self._directory)

    def size(self, name: str) -> int:
        """As `Files.size`."""
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size


def _open_regular(name: str | Path, place: Path, directory: int | None = None) -> BinaryIO:
    try:
        # O_NONBLOCK: a FIFO planted here must not hang us.
        handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        raise NotFound(f"{place}: {error.strerror}", reason="BLOB_MISSING", path=place) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InvalidInput(f"{place} is not a regular file", path=place)
    return os.fdopen(handle, "rb", buffering=0)


class ArchiveFiles:
    """The members of a tar archive; a context manager. Safe to use from several threads.

    Of members with one name the last counts, as tar extracts them. Links are followed inside the
    archive only, so what they say about other files is never read.

    Raises:
        NotFound: there is no such file.
        Corrupt: it is no tar archive, or a damaged one.
        Exhausted: it unpacks to more than the limit, or the disk is full.
    """

    def __init__(self, place: Path, scratch: Path, limits: Limits, cancel: Cancel) -> None:
        self.place = place
        self._scratch, self._limits, self._cancel = scratch, limits, cancel
        self._stack = contextlib.ExitStack()
        self._file: BinaryIO = io.BytesIO()
        self._members: dict[str, tuple[int, int] | str] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(_open_regular(self.place, self.place))
            compression = _compression(os.pread(self._file.fileno(), 6, 0))
            if compression:
                self._file = stack.enter_context(self._unpacked(compression))
            self._read_members()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, name: str) -> BinaryIO:
        """As `Files.open`."""
        start, size = self._find(name)
        return cast("BinaryIO", _Member(self._file.fileno(), start, size))

    def size(self, name: str) -> int:
        """As `Files.size`."""
        return self._find(name)[1]

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def _find(self, name: str) -> tuple[int, int]:
        seen = name
        for _ in range(_MAX_LINKS):
            found = self._members.get(seen)
            if found is None:
                raise NotFound(f"{self.place} has no member {name!r}", reason="BLOB_MISSING", path=self.place)
            if not isinstance(found, str):
                return found
            seen = found
        raise InvalidInput(f"{self.place}: the member {name!r} is a link in a circle", path=self.place)

    def _read_members(self) -> None:
        stream = _FileStream(self._file.fileno())
        names = 0
        try:
            for entry in tarstream.read_tar(stream):
                self._cancel.check()
                names += 1
                if names > _MAX_MEMBERS:
                    raise Exhausted(
                        f"{self.place} has more than {_MAX_MEMBERS} members; no image archive has",
                        reason="IMAGE_TOO_LARGE",
                    )
                name = _normal(entry.name)
                if entry.kind == tarstream.FILE and entry.sparse is None:
                    self._members[name] = (stream.position, entry.stored)
                elif entry.kind == tarstream.SYMLINK:
                    self._members[name] = _normal(entry.link, posixpath.dirname(name))
                elif entry.kind == tarstream.HARDLINK:
                    self._members[name] = _normal(entry.link)
        except (Corrupt, InvalidInput) as error:
            raise type(error)(
                f"{self.place} is not a sound tar archive: {error.message}",
                reason=error.reason,
                path=self.place,
            ) from error
        if not names:
            raise Corrupt(f"{self.place} is an empty archive", path=self.place)

    @contextlib.contextmanager
    def _unpacked(self, compression: str) -> Iterator[BinaryIO]:
        """The archive without its compression, in a file that vanishes when it is closed."""
        limit = self._limits.unpacked_bytes
        with disk_errors(self._scratch), tempfile.TemporaryFile(dir=self._scratch) as whole:
            try:
                with _decompressing(compression, self._file) as reader:
                    count = 0
                    while data := reader.read(_CHUNK):
                        self._cancel.check()
                        count += len(data)
                        if count > limit:
                            raise Exhausted(
                                f"{self.place} unpacks to more than {limit} bytes; "
                                "raise the limit if you trust it",
                                reason="IMAGE_TOO_LARGE",
                            )
                        whole.write(data)
            except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile) as error:
                raise Corrupt(f"{self.place} cannot be decompressed: {error}", path=self.place) from error
            whole.flush()
            yield cast("BinaryIO", whole)


def _compression(head: bytes) -> str:
    return next((name for magic, name in _MAGICS.items() if head.startswith(magic)), "")


def _decompressing(compression: str, file: BinaryIO) -> IO[bytes]:
    if compression == "gzip":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=file))
    if compression == "bzip2":
        return cast("IO[bytes]", bz2.BZ2File(file))
    if compression == "xz":
        return cast("IO[bytes]", lzma.LZMAFile(file))
    context = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    return cast("IO[bytes]", context.stream_reader(file, read_across_frames=True, closefd=False))


def _normal(name: bytes, base: str = "") -> str:
    """A member's name without `./`, `//` and `..`; what would lie outside gets a name that none has."""
    text = name.decode(errors="surrogateescape").lstrip("/")
    path = posixpath.normpath(posixpath.join(base, text))
    return "" if path.startswith("..") else path


class _FileStream(ByteStream):
    """A tar stream over a file, which skips by not reading."""

    __slots__ = ("_handle", "_size")

    def __init__(self, handle: int) -> None:
        super().__init__(iter(()))
        self._handle = handle
        self._size = os.fstat(handle).st_size

    def read(self, length: int) -> bytes:
        """`length` bytes, fewer only at the end of the file."""
        data = os.pread(self._handle, length, self.position)
        self.position += len(data)
        return data

    def skip(self, length: int) -> None:
        """Go on `length` bytes later.

        Raises:
            Truncated: the file is shorter.
        """
        if self.position + length > self._size:
            missing = self.position + length - self._size
            raise Truncated(f"the archive ends {missing} bytes too early, at byte {self._size}")
        self.position += length


class _Member(io.RawIOBase):
    """One member, by positional reads: several may be read at once."""

    def __init__(self, handle: int, start: int, size: int) -> None:
        self._handle, self._start, self._size, self._at = handle, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = os.pread(self._handle, left if size < 0 else min(size, left), self._start + self._at)
        self._at += len(data)
        return data
