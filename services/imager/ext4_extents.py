"""Extent trees: where a file's blocks are. Source: fs/ext4/ext4_extents.h of the kernel."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Final

from services.imager.ext4_format import BLOCK
from services.imager.tree import Extent

MAX_LENGTH: Final = 0x8000  # of an initialised extent
IN_INODE: Final = 4
_MAGIC: Final = 0xF30A
_PER_BLOCK: Final = (BLOCK - 12) // 12
CHECKED: Final = 12 + 12 * _PER_BLOCK  # the bytes that a node block's checksum covers
_HEADER: Final = struct.Struct("<HHHHI")
_LEAF: Final = struct.Struct("<IHHI")
# What begins the 60 bytes in the inode of a file in one piece, and of one without any.
ONE: Final = _HEADER.pack(_MAGIC, 1, IN_INODE, 0, 0)
NONE: Final = _HEADER.pack(_MAGIC, 0, IN_INODE, 0, 0)
_INDEX: Final = struct.Struct("<IIHH")


def pack_extents(extents: Iterable[Extent], allocate: Callable[[bytearray], int]) -> tuple[bytes, int]:
    """The 60 bytes for the inode, and how many blocks the tree took beside it.

    Args:
        extents: In logical order.
        allocate: Stores one tree block (its checksum is for the callee) and returns its number.
    """
    records = [(piece.logical, _pack_leaf(piece)) for piece in _split(extents)]
    depth = taken = 0
    while len(records) > IN_INODE:
        above = []
        for at in range(0, len(records), _PER_BLOCK):
            part = records[at : at + _PER_BLOCK]
            block = bytearray(BLOCK)
            _HEADER.pack_into(block, 0, _MAGIC, len(part), _PER_BLOCK, depth, 0)
            body = b"".join(record for _, record in part)
            block[12 : 12 + len(body)] = body
            number = allocate(block)
            taken += 1
            above.append((part[0][0], _INDEX.pack(part[0][0], number & 0xFFFFFFFF, number >> 32, 0)))
        records = above
        depth += 1
    header = _HEADER.pack(_MAGIC, len(records), IN_INODE, depth, 0)
    return (header + b"".join(record for _, record in records)).ljust(60, b"\0"), taken


def _pack_leaf(piece: Extent) -> bytes:
    return _LEAF.pack(piece.logical, piece.length, piece.physical >> 32, piece.physical & 0xFFFFFFFF)


def _split(extents: Iterable[Extent]) -> Iterable[Extent]:
    for extent in extents:
        logical, physical, left = extent
        while left > MAX_LENGTH:
            yield Extent(logical, physical, MAX_LENGTH)
            logical, physical, left = logical + MAX_LENGTH, physical + MAX_LENGTH, left - MAX_LENGTH
        yield Extent(logical, physical, left)
