"""Read-only disks from directories of this machine: skills, agents, anything that a box gets to read.

The same contents give the same bytes whoever checked them out: owner, times and extended attributes
are set, not copied. Of the mode the permission bits stay. Links are never followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from services.common.errors import Exhausted, InvalidInput, NotFound
from services.imager.cache import ImageCache
from services.imager.disk import Disk, content_digest, disk_seeds, find_disk
from services.imager.ext4 import WRITER_VERSION, Ext4Writer, ImageSize
from services.imager.layers import BLOCK_SIZE, MAX_FILE_BYTES, MAX_LINK_TARGET
from services.imager.limits import Cancel, Limits
from services.imager.tree import Extent, Kind, Node, Tree

EPOCH_NS: Final = 315_532_800 * 10**9  # 1980-01-01: zip archives cannot hold earlier times
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """One thing below the root: `path` relative to it, `same` what its other names share."""

    path: bytes
    kind: Kind
    mode: int
    size: int
    same: tuple[int, int]


def build_tree_disk(
    cache: ImageCache, root: Path, *, owner: tuple[int, int] = (0, 0), limits: Limits, cancel: Cancel
) -> Disk:
    """The read-only disk of the directory `root`, named by its contents; built if it is not there yet.

    Blocks; use a thread.

    Args:
        owner: uid and gid of everything in it.

    Raises:
        NotFound: there is no such directory.
        InvalidInput: it holds a device, FIFO or socket, or changes while it is read.
        Exhausted: the disk is full or a limit is passed; nothing is left behind.
        Cancelled: the caller cancelled.
    """
    found = list(_scan(root, limits))
    contents = hashlib.sha256()
    for item in found:
        _digest(contents, item, root, cancel)
    inputs = {
        "contents": contents.hexdigest(),
        "format": "ext4, read-only",
        "owner": owner,
        "writer": WRITER_VERSION,
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    with cache.lock(f"disk-{key}", cancel):
        if (disk := find_disk(cache, key)) is not None:
            return disk
        path = cache.root / "disks" / f"{key}.ext4"
        with cache.writing(path) as file:
            size = write_tree_disk(file, root, key, owner=owner, limits=limits, cancel=cancel)
            digest = content_digest(file, cancel)
            again = hashlib.sha256()
            for item in _scan(root, limits):
                _digest(again, item, root, cancel)
            if again.digest() != contents.digest():
                raise InvalidInput(f"{root} changed while it was read; try again", reason="TREE_CHANGED")
        record: dict[str, Any] = {
            "contents": contents.hexdigest(),
            "digest": digest,
            "inodes": size.inodes,
            "size_bytes": size.size_bytes,
            "used_bytes": size.used_bytes,
            "writer": WRITER_VERSION,
        }
        cache.write_record("disks", key, record)
        return Disk(path=path, digest=f"sha256:{key}", size_bytes=size.size_bytes)


def write_tree_disk(
    file: BinaryIO,
    root: Path,
    key: str,
    *,
    owner: tuple[int, int] = (0, 0),
    limits: Limits,
    cancel: Cancel,
) -> ImageSize:
    """Write the directory `root` as a read-only ext4 image to `file`, which is empty.

    Args:
        key: Any text that names the contents; the file system's UUID is made of it.
        owner: uid and gid of everything in it.

    Raises:
        NotFound, InvalidInput, Exhausted, Cancelled: as `build_tree_disk`.
    """
    uuid, hash_seed = disk_seeds(key)
    with Ext4Writer(file, uuid=uuid, hash_seed=hash_seed) as writer:
        tree = Tree()
        nodes: dict[tuple[int, int], Node] = {}
        left = limits.unpacked_bytes
        for item in _scan(root, limits):
            cancel.check()
            node = nodes.get(item.same) if item.kind is not Kind.DIRECTORY else None
            if node is None:
                node = nodes[item.same] = Node(item.kind, item.mode, *owner, EPOCH_NS)
                if item.kind is Kind.FILE:
                    left -= item.size
                    if left < 0:
                        raise Exhausted(
                            f"{root} holds more than {limits.unpacked_bytes} bytes", reason="IMAGE_TOO_LARGE"
                        )
                    node.size = item.size
                    if item.size:
                        first = writer.store(_contents(root, item, cancel), item.size)
                        node.extents = (Extent(0, first, -(-item.size // BLOCK_SIZE)),)
                elif item.kind is Kind.SYMLINK:
                    node.target = _target(root, item)
            tree.add(item.path, node)
        tree.root.children.setdefault(b"lost+found", Node(Kind.DIRECTORY, 0o700, 0, 0, EPOCH_NS))
        return writer.finish(tree, read_only=True)


def _scan(root: Path, limits: Limits) -> Iterator[_Found]:
    """Everything below `root`, itself first, parents before children, names sorted."""
    base = os.fsencode(root)
    try:
        info = os.stat(base)
    except FileNotFoundError as error:
        raise NotFound(f"there is no directory {root}", reason="DIRECTORY_NOT_FOUND", path=root) from error
    if not stat.S_ISDIR(info.st_mode):
        raise InvalidInput(f"{root} is not a directory", reason="NOT_A_DIRECTORY", path=root)
    count = 0
    stack = [(b".", info)]
    while stack:
        path, info = stack.pop()
        count += 1
        if count > limits.entries:
            raise Exhausted(f"{root} holds more than {limits.entries} files", reason="IMAGE_TOO_LARGE")
        kind = _kind(root, path, info)
        yield _Found(
            path=path,
            kind=kind,
            mode=0o777 if kind is Kind.SYMLINK else info.st_mode & 0o777,
            size=info.st_size if kind is Kind.FILE else 0,
            same=(info.st_dev, info.st_ino),
        )
        if kind is Kind.DIRECTORY:
            with os.scandir(os.path.join(base, path)) as entries:
                below = sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in entries)
            stack.extend((os.path.join(path, name), info) for name, info in reversed(below))


def _kind(root: Path, path: bytes, info: os.stat_result) -> Kind:
    kinds = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK}
    kind = kinds.get(stat.S_IFMT(info.st_mode))
    if kind is None:
        raise InvalidInput(
            f"{root}/{os.fsdecode(path)} is no file, directory or symbolic link; a skill cannot hold it",
            reason="SPECIAL_FILE",
        )
    return kind


def _target(root: Path, item: _Found) -> bytes:
    target = os.readlink(os.path.join(os.fsencode(root), item.path))
    if not 0 < len(target) <= MAX_LINK_TARGET:
        raise InvalidInput(f"{root}/{os.fsdecode(item.path)} is a link with {len(target)} bytes")
    return target


def _contents(root: Path, item: _Found, cancel: Cancel) -> Iterator[bytes]:
    """Exactly `item.size` bytes of a file that is still the one that was found."""
    shown = f"{root}/{os.fsdecode(item.path)}"
    if item.size > MAX_FILE_BYTES:
        raise InvalidInput(f"{shown} has {item.size} bytes; ext4 allows {MAX_FILE_BYTES}")
    try:
        handle = os.open(
            os.path.join(os.fsencode(root), item.path),
            os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK,
        )
    except OSError as error:
        raise InvalidInput(f"{shown} cannot be read: {error.strerror}", reason="UNREADABLE") from error
    with os.fdopen(handle, "rb", buffering=0) as file:
        info = os.fstat(handle)
        if (info.st_dev, info.st_ino, info.st_size) != (*item.same, item.size):
            raise InvalidInput(f"{shown} changed while it was read; try again", reason="TREE_CHANGED")
        left = item.size
        while left:
            cancel.check()
            data = file.read(min(left, _CHUNK))
            if not data:
                raise InvalidInput(f"{shown} changed while it was read; try again", reason="TREE_CHANGED")
            left -= len(data)
            yield data


def _digest(sums: Any, item: _Found, root: Path, cancel: Cancel) -> None:
    """Add one item to the digest of a tree: lengths first, so that no two trees look alike."""
    target = _target(root, item) if item.kind is Kind.SYMLINK else b""
    header = [len(item.path), int(item.kind), item.mode, item.size, len(target)]
    sums.update(json.dumps(header).encode() + item.path + target)
    if item.kind is Kind.FILE:
        for data in _contents(root, item, cancel):
            sums.update(data)
