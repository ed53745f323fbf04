"""A flattened image as an initramfs: a cpio archive in the "newc" format that Linux unpacks at boot.

The format has no extended attributes, whole seconds of time until 2106, and files below 4 GiB.
The image's `/init` is what the kernel starts; another program is named by `rdinit=`.
"""

from __future__ import annotations

import os
import stat
from typing import BinaryIO, Final

from services.common.errors import InvalidInput
from services.imager.cpio import pack_header, pack_trailer, padding
from services.imager.flatten import Spool
from services.imager.tree import Kind, Node, Tree

_MAX: Final = (1 << 32) - 1  # fields are eight hex digits
_TYPES: Final = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHARDEV: stat.S_IFCHR,
    Kind.BLOCKDEV: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
}


def write_initramfs(tree: Tree, spool: Spool, out: BinaryIO) -> None:
    """Write `tree` to `out`, directories before their contents, names sorted.

    Raises:
        InvalidInput: a file is too large for the format, or is called like its end mark.
    """
    links: dict[int, int] = {}
    for _, _, node in tree.walk():
        links[id(node)] = links.get(id(node), 0) + 1
    numbers: dict[int, int] = {}
    paths = {id(tree.root): b""}
    for directory, name, node in tree.walk():
        path = paths[id(directory)] + name
        if node.kind is Kind.DIRECTORY:
            paths[id(node)] = path + b"/"
        seen = id(node) in numbers
        number = numbers.setdefault(id(node), len(numbers) + 1)
        # Of a file with several names the kernel takes the content from any that has it.
        size = 0 if seen else _size(path, node)
        out.write(
            pack_header(
                _checked(path),
                inode=number,
                mode=_TYPES[node.kind] | node.mode,
                uid=node.uid,
                gid=node.gid,
                links=2 if node.kind is Kind.DIRECTORY else links[id(node)],
                mtime=min(max(node.mtime_ns // 10**9, 0), _MAX),
                size=size,
                device=(node.major, node.minor),
            )
        )
        if size and node.kind is Kind.SYMLINK:
            out.write(node.target + padding(size))
        elif size:
            for piece in spool.content(node):
                out.write(piece)
            out.write(padding(size))
    out.write(pack_trailer())


def _size(path: bytes, node: Node) -> int:
    if node.kind is Kind.SYMLINK:
        return len(node.target)
    if node.kind is not Kind.FILE:
        return 0
    if node.size > _MAX:
        raise InvalidInput(
            f"{os.fsdecode(path)!r} has {node.size} bytes; a file of an initramfs is smaller than 4 GiB, "
            "export it as ext4 or tar",
            reason="FILE_TOO_LARGE",
        )
    return node.size


def _checked(path: bytes) -> bytes:
    if path == b"TRAILER!!!":
        raise InvalidInput("a file called TRAILER!!! would end the initramfs", reason="BAD_NAME")
    return path
