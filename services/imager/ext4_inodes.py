"""Inode numbers, link counts, and the table of inodes."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from services.common.errors import InvalidInput
from services.imager import ext4_extents, ext4_xattr
from services.imager.crc32c import crc32c, crc32c_rows
from services.imager.ext4_format import (
    BLOCK,
    EXTENTS_FLAG,
    EXTRA_ISIZE,
    FIRST_INODE,
    INDEX_FLAG,
    INODE_SIZE,
    ROOT_INODE,
    inode_seed,
)
from services.imager.tree import Extent, Kind, Node, Tree

MAX_LINKS: Final = 65_000  # EXT4_LINK_MAX; directories with more say 1 (dir_nlink)
_LOST_AND_FOUND: Final = b"lost+found"
_SECTORS: Final = BLOCK // 512
_FAST_SYMLINK: Final = 60
_BATCH: Final = 16384  # inodes whose checksums are computed at once: 4 MiB
_INODE: Final = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHHHHIIIIIII")
# The same inode in the pieces that files of one owner, mode and time share, and those that differ.
_OWNED: Final = struct.Struct("<HH")
_TIMED: Final = struct.Struct("<IIIIH")
_REST: Final = struct.Struct("<IHHHHHHHHIIIIIII")
_PLAIN: Final = struct.Struct("<4sI18sHIII12sIHHI36xIII48s")
_REMEMBERED: Final = 4096
_CSUM_LOW_AT: Final = 0x7C
_CSUM_HIGH_AT: Final = 0x82
_EXTRA_ISIZE_AT: Final = 0x80
_MODES: Final = {
    Kind.FILE: 0x8000,
    Kind.DIRECTORY: 0x4000,
    Kind.CHARDEV: 0x2000,
    Kind.BLOCKDEV: 0x6000,
    Kind.FIFO: 0x1000,
    Kind.SYMLINK: 0xA000,
}


class BlockSink(Protocol):
    """Where metadata blocks go, one behind the other."""

    @property
    def next_block(self) -> int:
        """The number that the next block will get."""

    def append(self, block: bytes | bytearray) -> int:
        """Write one block and return its number."""


class Numbered(NamedTuple):
    """All nodes of a tree, by inode number: the root, `lost+found`, the rest.

    Attributes:
        nodes: Each once, whatever the count of its names.
        directories: (directory, the one that holds it, its names in order).
    """

    nodes: list[Node]
    directories: list[tuple[Node, Node, list[bytes]]]


def number_inodes(tree: Tree) -> Numbered:
    """Give every node its inode number and link count; `lost+found` is made if missing.

    Raises:
        InvalidInput: a file has too many names, or `lost+found` is not a directory.
    """
    root, kind = tree.root, Kind.DIRECTORY
    lost = root.children.get(_LOST_AND_FOUND)
    if lost is None:
        lost = root.children[_LOST_AND_FOUND] = Node(kind, 0o700)
    if lost.kind is not kind:
        raise InvalidInput("/lost+found is not a directory, which ext4 demands")
    root.number, root.links = ROOT_INODE, 2
    lost.number, lost.links = FIRST_INODE, 2
    ordered, parents = [root, lost], {ROOT_INODE: root, FIRST_INODE: root}
    names_of: dict[int, list[bytes]] = {}
    following = FIRST_INODE + 1
    stack = [root]
    while stack:  # as `Tree.walk` goes, written out: this is done for every file
        directory = stack.pop()
        children = directory.children
        names = names_of[directory.number] = sorted(children)
        below = []
        for name in names:
            node = children[name]
            if node.kind is kind:
                directory.links += 1
                below.append(node)
                if node is lost:
                    continue
                node.links = 2
                parents[following] = directory
            elif node.number:
                node.links += 1
                if node.links > MAX_LINKS:
                    raise InvalidInput(f"the file {name!r} has more than {MAX_LINKS} hard links")
                continue
            else:
                node.links = 1
            node.number = following
            following += 1
            ordered.append(node)
        below.reverse()
        stack += below
    directories = [
        (node, parents[node.number], names_of[node.number]) for node in ordered if node.kind is kind
    ]
    return Numbered(ordered, directories)


class InodeTable:
    """The inodes from 1 to `last`, packed; those that nobody puts stay empty."""

    def __init__(self, last: int, seed: int) -> None:
        self._records = bytearray(last * INODE_SIZE)
        self._seed = seed
        self._directories: list[int] = []
        self._shared: dict[tuple[Kind, int, int, int, int], tuple[bytes, bytes, bytes]] = {}
        for number in range(1, FIRST_INODE):  # the reserved ones: empty, but their checksums are read
            struct.pack_into("<H", self._records, (number - 1) * INODE_SIZE + _EXTRA_ISIZE_AT, EXTRA_ISIZE)

    def put(self, node: Node, sink: BlockSink, *, indexed: bool = False) -> None:
        """Pack one node; what does not fit into its inode goes to `sink`.

        A directory's blocks are already in its `extents`; `indexed` says that they are hashed.
        """
        if not node.xattrs and (node.kind is Kind.FILE or node.kind is Kind.DIRECTORY):
            extents = node.extents
            if not extents or (len(extents) == 1 and extents[0].length <= ext4_extents.MAX_LENGTH):
                self._put_plain(node, indexed)
                return
        flags = blocks = 0
        area = b""
        size = node.size
        if node.kind in (Kind.FILE, Kind.DIRECTORY):
            flags, (area, taken) = EXTENTS_FLAG, self._extents(node, node.extents, sink)
            blocks = taken + sum(extent.length for extent in node.extents)
            if node.kind is Kind.DIRECTORY:
                self._directories.append(node.number)
                flags |= INDEX_FLAG if indexed else 0
        elif node.kind is Kind.SYMLINK:
            size = len(node.target)
            if size < _FAST_SYMLINK:
                area = node.target
            else:
                number = sink.append(bytearray(node.target.ljust(BLOCK, b"\0")))
                flags, (area, _) = EXTENTS_FLAG, self._extents(node, (Extent(0, number, 1),), sink)
                blocks = 1
        elif node.kind in (Kind.CHARDEV, Kind.BLOCKDEV):
            area = _device(node.major, node.minor)
        inline, attribute_block = self._attributes(node, sink)
        blocks += 1 if attribute_block else 0
        self._pack(node, size, flags, blocks * _SECTORS, area, attribute_block, inline)

    def _put_plain(self, node: Node, indexed: bool) -> None:
        """A file or directory in one piece or none, without attributes, as nearly all are.

        Only seven fields differ between files of one owner, mode and time: 2 us instead of 5.
        """
        key = node.kind, node.mode, node.uid, node.gid, node.mtime_ns
        found = self._shared.get(key)
        if found is None:
            seconds, extra = _time(node.mtime_ns)
            found = (
                _OWNED.pack(_MODES[node.kind] | node.mode, node.uid & 0xFFFF),
                _TIMED.pack(seconds, seconds, seconds, 0, node.gid & 0xFFFF),
                _REST.pack(
                    0, 0, 0, node.uid >> 16, node.gid >> 16, 0, 0,
                    EXTRA_ISIZE, 0, extra, extra, extra, seconds, extra, 0, 0,
                ),
            )  # fmt: skip
            if len(self._shared) >= _REMEMBERED:
                self._shared.clear()
            self._shared[key] = found
        flags, links, size = EXTENTS_FLAG, node.links, node.size
        if node.kind is Kind.DIRECTORY:
            self._directories.append(node.number)
            flags |= INDEX_FLAG if indexed else 0
            links = links if links <= MAX_LINKS else 1
        header, logical, length, physical = ext4_extents.ONE, 0, 0, 0
        if node.extents:
            logical, physical, length = node.extents[0]
        else:
            header = ext4_extents.NONE
        _PLAIN.pack_into(
            self._records, (node.number - 1) * INODE_SIZE,
            found[0], size & 0xFFFFFFFF, found[1], links, length * _SECTORS, flags, 0,
            header, logical, length, physical >> 32, physical & 0xFFFFFFFF, 0, 0, size >> 32, found[2],
        )  # fmt: skip

    def _extents(self, node: Node, extents: tuple[Extent, ...], sink: BlockSink) -> tuple[bytes, int]:
        def store(block: bytearray) -> int:
            value = crc32c(inode_seed(self._seed, node.number), memoryview(block)[: ext4_extents.CHECKED])
            struct.pack_into("<I", block, ext4_extents.CHECKED, value)
            return sink.append(block)

        return ext4_extents.pack_extents(extents, store)

    def _attributes(self, node: Node, sink: BlockSink) -> tuple[bytes, int]:
        if not node.xattrs:
            return b"", 0
        attributes = ext4_xattr.convert_xattrs(node.xattrs)
        if not attributes:
            return b"", 0
        inline = ext4_xattr.pack_inline(attributes)
        if inline is not None:
            return inline, 0
        block = ext4_xattr.pack_block(attributes)
        value = crc32c(crc32c(self._seed, struct.pack("<Q", sink.next_block)), block)
        struct.pack_into("<I", block, ext4_xattr.CHECKSUM_AT, value)
        return b"", sink.append(block)

    def _pack(self, node: Node, size: int, flags: int, sectors: int, area: bytes, attribute_block: int,
              inline: bytes) -> None:  # fmt: skip
        seconds, extra = _time(node.mtime_ns)
        at = (node.number - 1) * INODE_SIZE
        links = node.links if node.links <= MAX_LINKS else 1
        _INODE.pack_into(
            self._records, at,
            _MODES[node.kind] | node.mode, node.uid & 0xFFFF, size & 0xFFFFFFFF, seconds, seconds, seconds, 0,
            node.gid & 0xFFFF, links, sectors & 0xFFFFFFFF, flags, 0, area, 0, attribute_block & 0xFFFFFFFF,
            size >> 32, 0, sectors >> 32, attribute_block >> 32, node.uid >> 16, node.gid >> 16, 0, 0,
            EXTRA_ISIZE, 0, extra, extra, extra, seconds, extra, 0, 0,
        )  # fmt: skip
        if inline:
            self._records[at + ext4_xattr.INLINE_AT : at + INODE_SIZE] = inline

    def directories_by_group(self, per_group: int, groups: int) -> list[int]:
        """How many directories each group's inodes hold."""
        counts = [0] * groups
        for number in self._directories:
            counts[(number - 1) // per_group] += 1
        return counts

    def packed(self) -> Iterator[bytearray]:
        """The table with all checksums, in large pieces."""
        records = self._records
        count = len(records) // INODE_SIZE
        for start in range(0, count, _BATCH):
            end = min(start + _BATCH, count)
            prefixes = _inode_prefixes(range(start + 1, end + 1))
            rows = records[start * INODE_SIZE : end * INODE_SIZE]
            sums = crc32c_rows(self._seed, rows, INODE_SIZE, INODE_SIZE, prefixes, 8)
            low = struct.pack(f"<{len(sums)}I", *sums)
            for offset, byte in (
                (_CSUM_LOW_AT, 0),
                (_CSUM_LOW_AT + 1, 1),
                (_CSUM_HIGH_AT, 2),
                (_CSUM_HIGH_AT + 1, 3),
            ):
                rows[offset::INODE_SIZE] = low[byte::4]
            yield rows


def _inode_prefixes(numbers: Sequence[int]) -> bytes:
    """Each number and generation 0, which begin the checksums of what belongs to an inode."""
    words = [0] * (2 * len(numbers))
    words[::2] = numbers
    return struct.pack(f"<{len(words)}I", *words)


def live_ranges(nodes: list[Node]) -> list[tuple[int, int]]:
    """(first block, count) of all file data, in order, neighbours joined."""
    pieces = sorted([(extent.physical, extent.length) for node in nodes for extent in node.extents])
    return list(_joined(pieces))


def _joined(pieces: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    if not pieces:
        return
    start, count = pieces[0]
    for first, length in pieces[1:]:
        if first == start + count:
            count += length
        else:
            yield start, count
            start, count = first, length
    yield start, count


@functools.lru_cache(4096)
def _time(nanoseconds: int) -> tuple[int, int]:
    """Seconds modulo 2^32, and the field with two more bits and the nanoseconds; clamped to what exists."""
    nanoseconds = min(max(nanoseconds, -(1 << 31) * 10**9), ((3 << 32) + (1 << 31) - 1) * 10**9 + 10**9 - 1)
    seconds, rest = divmod(nanoseconds, 10**9)
    low = seconds & 0xFFFFFFFF
    signed = low - (1 << 32) if low >> 31 else low
    return low, (seconds - signed >> 32 & 3) | rest << 2


def _device(major: int, minor: int) -> bytes:
    """The old encoding in the first word where it fits, else the new one in the second."""
    if major < 256 and minor < 256:
        return struct.pack("<I", major << 8 | minor)
    return struct.pack("<II", 0, (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12)
