"""A flattened image as one tar archive in the PAX format, readable by GNU tar, bsdtar and docker import.

Times have nanoseconds, names may be any bytes, extended attributes are kept (`SCHILY.xattr.`), and
holes of more than 64 KiB are left out (GNU tar manual, "PAX Format, Version 1.0").
"""

from __future__ import annotations

import os
import tarfile
from typing import BinaryIO, Final

from services.imager.flatten import Spool
from services.imager.tarstream import BLOCK
from services.imager.tree import Kind, Node, Tree

_HOLE: Final = 64 << 10
_RECORD: Final = 20 * BLOCK  # what GNU tar pads an archive to
_TYPES: Final = {
    Kind.FILE: tarfile.REGTYPE,
    Kind.DIRECTORY: tarfile.DIRTYPE,
    Kind.SYMLINK: tarfile.SYMTYPE,
    Kind.CHARDEV: tarfile.CHRTYPE,
    Kind.BLOCKDEV: tarfile.BLKTYPE,
    Kind.FIFO: tarfile.FIFOTYPE,
}


def write_tar(tree: Tree, spool: Spool, out: BinaryIO) -> None:
    """Write `tree` to `out`, directories before their contents, names sorted."""
    writer = _TarWriter(spool, out)
    writer.add(b"./", tree.root)
    paths = {id(tree.root): b""}
    for directory, name, node in tree.walk():
        path = paths[id(directory)] + name
        if node.kind is Kind.DIRECTORY:
            paths[id(node)] = path + b"/"
        writer.add(path, node)
    writer.finish()


class _TarWriter:
    def __init__(self, spool: Spool, out: BinaryIO) -> None:
        self._spool, self._out = spool, out
        self._names: dict[int, bytes] = {}  # first name of each file, for hard links
        self._size = 0

    def add(self, path: bytes, node: Node) -> None:
        info = tarfile.TarInfo(os.fsdecode(path))
        info.type, info.mode, info.uid, info.gid = _TYPES[node.kind], node.mode, node.uid, node.gid
        info.mtime = node.mtime_ns // 10**9
        headers = {"SCHILY.xattr." + os.fsdecode(key): value for key, value in (node.xattrs or {}).items()}
        texts = {key: os.fsdecode(value) for key, value in headers.items()}
        if node.mtime_ns % 10**9 or info.mtime < 0:
            texts["mtime"] = _decimal(node.mtime_ns)
            info.mtime = max(info.mtime, 0)
        info.pax_headers = texts
        first = self._names.setdefault(id(node), path)
        if first is not path:
            info.type, info.linkname = tarfile.LNKTYPE, os.fsdecode(first)
            self._header(info)
        elif node.kind is Kind.FILE:
            self._file(info, node)
        else:
            info.linkname = os.fsdecode(node.target)
            info.devmajor, info.devminor = node.major, node.minor
            self._header(info)

    def _file(self, info: tarfile.TarInfo, node: Node) -> None:
        fragments = self._spool.fragments(node)
        if node.size - sum(length for _, length in fragments) < _HOLE:
            info.size = node.size
            self._header(info)
            for piece in self._spool.content(node):
                self._write(piece)
            self._pad(BLOCK)
            return
        if not fragments or sum(fragments[-1]) < node.size:
            fragments.append((node.size, 0))  # so GNU tar tells of a hole at the end
        listing = "\n".join(str(part) for part in (len(fragments), *(x for pair in fragments for x in pair)))
        table = listing.encode() + b"\n"
        table += bytes(-len(table) % BLOCK)
        info.pax_headers = {
            **info.pax_headers,
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": info.name,
            "GNU.sparse.realsize": str(node.size),
        }
        directory, _, name = info.name.rpartition("/")
        info.name = f"{directory or '.'}/GNUSparseFile.0/{name}"
        info.size = len(table) + sum(length for _, length in fragments)
        self._header(info)
        self._write(table)
        for piece in self._spool.data(node):
            self._write(piece)
        self._pad(BLOCK)

    def finish(self) -> None:
        self._write(bytes(2 * BLOCK))
        self._pad(_RECORD)

    def _header(self, info: tarfile.TarInfo) -> None:
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._size += len(data)

    def _pad(self, unit: int) -> None:
        self._write(bytes(-self._size % unit))


def _decimal(nanoseconds: int) -> str:
    seconds, rest = divmod(abs(nanoseconds), 10**9)
    return f"{'-' if nanoseconds < 0 else ''}{seconds}.{rest:09d}"
