"""A deterministic writer of cpio archives in the "newc" format, as the kernel reads them.

Same entries, same bytes: names are sorted, times are fixed, inode numbers count up. No
temporary tree and no root: owners and device numbers are just fields. Format:
Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from services.common.errors import Corrupt, InvalidInput

_MAGIC = b"070701"
_HEADER_SIZE = 110
_TRAILER = "TRAILER!!!"
_FIELD_MAX = 0xFFFFFFFF
# The kernel's own limit for a name (PATH_MAX); longer ones it skips without a word.
_NAME_MAX = 4095
_COPY = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of an archive.

    Attributes:
        name: Path without a leading slash, e.g. "usr/bin/python3".
        mode: Type and permission bits as in `st_mode`.
        content: A regular file's bytes, or the file that holds them; a link's target.
        device: (major, minor) of a device node.
    """

    name: str
    mode: int
    uid: int = 0
    gid: int = 0
    content: bytes | Path = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755, *, uid: int = 0, gid: int = 0) -> Entry:
    """A directory."""
    return Entry(name=name, mode=stat.S_IFDIR | mode, uid=uid, gid=gid)


def file(name: str, content: bytes | Path, mode: int = 0o644, *, uid: int = 0, gid: int = 0) -> Entry:
    """A regular file."""
    return Entry(name=name, mode=stat.S_IFREG | mode, uid=uid, gid=gid, content=content)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(name=name, mode=stat.S_IFLNK | 0o777, content=target.encode())


def character_device(name: str, major: int, minor: int, mode: int) -> Entry:
    """A character device node."""
    return Entry(name=name, mode=stat.S_IFCHR | mode, device=(major, minor))


def write_archive(entries: Iterable[Entry], out: BinaryIO) -> int:
    """Write `entries` and the trailer to `out`; return the bytes written.

    Parents that no entry names become directories of mode 0755, root's. Two entries of
    the same name and content are one; of different content they are an error.

    Raises:
        InvalidInput: a name is absolute, empty, has `.`/`..` parts or is too long; two
            entries share a name; a parent is not a directory; a value is out of range.
    """
    size = 0
    for inode, entry in enumerate(_complete(entries), start=1):
        size += _write_entry(entry, inode, out)
    return size + out.write(pack_trailer())


def _complete(entries: Iterable[Entry]) -> list[Entry]:
    by_name: dict[str, Entry] = {}
    for entry in entries:
        _check(entry)
        if by_name.setdefault(entry.name, entry) != entry:
            raise InvalidInput(
                f"two different entries are called {entry.name}", reason="DUPLICATE_ENTRY", path=entry.name
            )
    for name in list(by_name):
        parts = name.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            if not stat.S_ISDIR(by_name.setdefault(parent, directory(parent)).mode):
                raise InvalidInput(
                    f"{parent} is not a directory but {name} is below it", reason="BAD_PARENT", path=name
                )
    # Sorting by path parts puts every directory before what is in it.
    return [by_name[name] for name in sorted(by_name, key=lambda name: name.split("/"))]


def _check(entry: Entry) -> None:
    name = entry.name
    if (
        not name
        or "\0" in name
        or any(part in ("", ".", "..") for part in name.split("/"))
        or name == _TRAILER
    ):
        raise InvalidInput(f"{name!r} is not a name that an archive can hold", reason="BAD_NAME", path=name)
    if len(name.encode()) > _NAME_MAX:
        raise InvalidInput(f"the name {name[:60]!r}… is too long", reason="BAD_NAME", path=name)
    for value in (entry.mode, entry.uid, entry.gid, *entry.device):
        if not 0 <= value <= _FIELD_MAX:
            raise InvalidInput(f"{name}: {value} does not fit its field", reason="OUT_OF_RANGE", path=name)


def pack_header(
    name: bytes,
    *,
    inode: int,
    mode: int,
    uid: int = 0,
    gid: int = 0,
    links: int = 1,
    mtime: int = 0,
    size: int = 0,
    device: tuple[int, int] = (0, 0),
) -> bytes:
    """The header of one entry with its name, padded; `size` bytes of content follow, padded too."""
    fields = (inode, mode, uid, gid, links, mtime, size, 0, 0, *device, len(name) + 1, 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields) + name + b"\0"
    return header + padding(len(header))


def pack_trailer() -> bytes:
    """The entry that ends an archive."""
    return pack_header(_TRAILER.encode(), inode=0, mode=0)


def _write_header(entry: Entry, inode: int, size: int, out: BinaryIO) -> int:
    header = pack_header(
        entry.name.encode(),
        inode=inode,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        links=2 if stat.S_ISDIR(entry.mode) else 1,
        size=size,
        device=entry.device,
    )
    return out.write(header)


def padding(size: int) -> bytes:
    """What fills `size` bytes up to a whole number of words of four."""
    return bytes(-size % 4)


def _write_entry(entry: Entry, inode: int, out: BinaryIO) -> int:
    if not isinstance(entry.content, Path):
        size = _write_header(entry, inode, _checked_size(entry, len(entry.content)), out)
        return size + out.write(entry.content) + out.write(padding(len(entry.content)))
    with entry.content.open("rb") as source:
        expected = source.seek(0, 2)
        source.seek(0)
        size = _write_header(entry, inode, _checked_size(entry, expected), out)
        copied = 0
        while chunk := source.read(_COPY):
            copied += out.write(chunk)
    if copied != expected:
        raise Corrupt(f"{entry.content} changed while it was read", reason="FILE_CHANGED", path=entry.content)
    return size + copied + out.write(padding(copied))


def _checked_size(entry: Entry, size: int) -> int:
    if size > _FIELD_MAX:
        raise InvalidInput(f"{entry.name} is larger than 4 GiB", reason="OUT_OF_RANGE", path=entry.name)
    return size


def read_archive(data: bytes) -> Iterator[Entry]:
    """The entries of an archive, up to its trailer.

    Raises:
        Corrupt: a header is not one, or says more bytes than there are.
    """
    view, at = memoryview(data), 0
    while True:
        header = bytes(view[at : at + _HEADER_SIZE])
        if len(header) < _HEADER_SIZE or header[:6] != _MAGIC:
            raise Corrupt(f"no cpio header at byte {at}", reason="BAD_CPIO")
        try:
            fields = [int(header[start : start + 8], 16) for start in range(6, _HEADER_SIZE, 8)]
        except ValueError as error:
            raise Corrupt(f"a cpio header at byte {at} is not hexadecimal", reason="BAD_CPIO") from error
        mode, uid, gid, size, major, minor, name_size = (fields[index] for index in (1, 2, 3, 6, 9, 10, 11))
        name_at = at + _HEADER_SIZE
        content_at = name_at + name_size + -(_HEADER_SIZE + name_size) % 4
        at = content_at + size + -size % 4
        if name_size < 1 or content_at + size > len(view) or view[name_at + name_size - 1] != 0:
            raise Corrupt(f"a cpio entry at byte {name_at} is cut off", reason="BAD_CPIO")
        name = bytes(view[name_at : name_at + name_size - 1]).decode("utf-8", "surrogateescape")
        if name == _TRAILER:
            return
        yield Entry(
            name=name,
            mode=mode,
            uid=uid,
            gid=gid,
            content=bytes(view[content_at : content_at + size]),
            device=(major, minor),
        )
