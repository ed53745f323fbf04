"""Writes an ext4 image: file data as it arrives, all metadata behind it at the end.

    block 0        superblock
    blocks 1…128   group descriptors; those not needed yet are free: room to grow to 1 TiB
    block 129…     file data, in the order of arrival, without gaps
    then           directories, long symbolic links, extent trees, attribute blocks
    then           block bitmaps, inode bitmaps, inode tables of all groups
    then           free space

No root, no unpacked tree, no mount. The same input gives the same bytes on any machine.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Final, Self

from services.common.errors import Exhausted
from services.imager import ext4_dirs
from services.imager.blockfile import BlockFile
from services.imager.crc32c import crc32c, crc32c_rows
from services.imager.ext4_format import (
    ALL_ONES,
    BLOCK,
    FIRST_INODE,
    SUPERBLOCK_OFFSET,
    inode_seed,
    pack_superblock,
)
from services.imager.ext4_groups import DATA_START, MAX_BLOCKS, GroupTables, gaps, plan_geometry
from services.imager.ext4_inodes import InodeTable, live_ranges, number_inodes
from services.imager.tree import Extent, Node, Tree

WRITER_VERSION: Final = 1  # part of every cache key: raise it when the bytes of an image change
_ZEROS: Final = bytes(BLOCK)
_PUNCH_HOLE: Final = 0x1 | 0x2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, linux/falloc.h
_LEAF_BATCH: Final = 256  # directory blocks whose checksums are computed at once: 1 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSize:
    """What was written.

    Attributes:
        size_bytes: Length of the image; its free space is a hole.
        used_bytes: Occupied by data and metadata.
        inodes: Files, directories and so on.
    """

    size_bytes: int
    used_bytes: int
    inodes: int


class Ext4Writer:
    """Makes one image in `file`, which is empty, seekable and open for writing; a context manager.

    `store` takes file contents, any number of times; `finish` writes the rest. Neither syncs.

    Args:
        file: Where the image goes.
        uuid: 16 bytes that name it.
        hash_seed: 16 bytes for hashed directories.
    """

    def __init__(self, file: BinaryIO, *, uuid: bytes, hash_seed: bytes) -> None:
        self._file = file
        self._uuid, self._hash_seed = uuid, hash_seed
        self._seed = crc32c(ALL_ONES, uuid)
        self._next = DATA_START
        self._blocks = BlockFile(file.fileno(), DATA_START)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._blocks.close()

    def store_piece(self, data: bytes | memoryview) -> int:
        """As `store`, of content that is in one piece."""
        first = self._reserve(len(data))
        self._blocks.put(data)
        return first

    def store(self, chunks: Iterator[bytes | memoryview], length: int) -> int:
        """Write `length` bytes from `chunks` from a new block on; return that block's number.

        Raises:
            Exhausted: the image would pass the largest size.
            OSError: the disk is full or broken.
        """
        first = self._reserve(length)
        for chunk in chunks:
            self._blocks.write(chunk)
        self._blocks.pad()
        return first

    def _reserve(self, length: int) -> int:
        """The number of the first of new blocks for `length` bytes."""
        first = self._next
        following = first + -(-length // BLOCK)
        if following > MAX_BLOCKS:
            raise Exhausted("the image's files need more than 1 TiB", reason="IMAGE_TOO_LARGE")
        self._next = following
        return first

    def finish(
        self, tree: Tree, *, size_bytes: int | None = None, free_bytes: int = 0, read_only: bool = False
    ) -> ImageSize:
        """Write all metadata of `tree`, which must not change afterwards.

        Args:
            tree: What the image holds; `lost+found` is added.
            size_bytes: Length of the image; None to let the contents and `free_bytes` decide.
            free_bytes: Room to leave for what will be written later.
            read_only: Kernels must never mount it for writing; it has no spare inodes then.

        Raises:
            InvalidInput: `size_bytes` is too small, or the tree holds what ext4 cannot.
        """
        nodes, directories = number_inodes(tree)
        data_end = self._next
        data = live_ranges(nodes)
        self._punch(gaps(data, DATA_START, data_end))
        indexed = self._write_directories(directories)
        used_inodes = FIRST_INODE - 2 + len(nodes)  # 1 to 10 are reserved, the root is one of them
        table = InodeTable(used_inodes, self._seed)
        for node in nodes:
            table.put(node, self, indexed=node.number in indexed)
        geometry = plan_geometry(
            data_end=self._next,
            used_inodes=used_inodes,
            size_bytes=size_bytes,
            free_bytes=free_bytes,
            uuid=self._uuid,
            hash_seed=self._hash_seed,
            read_only=read_only,
        )
        groups = GroupTables(
            geometry,
            start=self._next,
            used=[*data, (data_end, self._next - data_end)],
            used_inodes=used_inodes,
            directories=table.directories_by_group(geometry.inodes_per_group, geometry.groups),
        )
        self._blocks.write(groups.bitmaps)
        for records in table.packed():
            self._blocks.write(records)
        self._blocks.pad()
        self._blocks.flush()
        descriptor = self._file.fileno()
        os.ftruncate(descriptor, geometry.blocks * BLOCK)
        superblock = pack_superblock(dataclasses.replace(geometry, free_blocks=groups.free_blocks))
        for part, offset in ((groups.descriptors, BLOCK), (superblock, SUPERBLOCK_OFFSET)):
            written = 0
            while written < len(part):  # a full disk shows at the second call
                written += os.pwrite(descriptor, part[written:], offset + written)
        return ImageSize(
            size_bytes=geometry.blocks * BLOCK,
            used_bytes=(geometry.blocks - groups.free_blocks) * BLOCK,
            inodes=len(nodes),
        )

    @property
    def next_block(self) -> int:
        """The number that the next block will get."""
        return self._next

    def append(self, block: bytes | bytearray) -> int:
        """Write one metadata block behind all else; return its number."""
        number = self._next
        self._blocks.write(block)
        self._next = number + 1
        return number

    def _write_directories(self, directories: list[tuple[Node, Node, list[bytes]]]) -> set[int]:
        """Write all directories' blocks and note them as extents; return the inodes of the hashed ones."""
        indexed: set[int] = set()
        waiting: list[bytearray] = []
        unchecked: list[tuple[int, bytearray]] = []

        def flush() -> None:
            rows = b"".join(block for _, block in unchecked)
            prefixes = b"".join(struct.pack("<II", number, 0) for number, _ in unchecked)
            sums = crc32c_rows(self._seed, rows, BLOCK, ext4_dirs.LEAF_CHECKED, prefixes, 8)
            for (_, block), value in zip(unchecked, sums, strict=True):
                struct.pack_into("<I", block, BLOCK - 4, value)
            for block in waiting:
                self.append(block)
            waiting.clear()
            unchecked.clear()

        for node, parent, ordered in directories:
            children = node.children
            names = [(name, (child := children[name]).number, child.kind) for name in ordered]
            made = ext4_dirs.build_directory(node.number, parent.number, names, self._hash_seed)
            if made.indexed:
                indexed.add(node.number)
            count = len(made.blocks)
            node.extents, node.size = (Extent(0, self._next + len(waiting), count),), count * BLOCK
            for i, block in enumerate(made.blocks):
                if i in made.index_nodes:
                    covered, at = ext4_dirs.index_checked(block, made.index_nodes[i])
                    struct.pack_into("<I", block, at, crc32c(inode_seed(self._seed, node.number), covered))
                else:
                    unchecked.append((node.number, block))
                waiting.append(block)
            if len(waiting) >= _LEAF_BATCH:
                flush()
        flush()
        return indexed

    def _punch(self, holes: list[tuple[int, int]]) -> None:
        """Make holes of replaced files' data; zeros where the file system below has no holes."""
        if not holes:
            return
        self._blocks.flush()
        descriptor = self._file.fileno()
        libc = ctypes.CDLL(None, use_errno=True)
        for start, count in holes:
            offset, length = ctypes.c_int64(start * BLOCK), ctypes.c_int64(count * BLOCK)
            if libc.fallocate64(descriptor, _PUNCH_HOLE, offset, length) != 0:
                for block in range(start, start + count):
                    os.pwrite(descriptor, _ZEROS, block * BLOCK)
