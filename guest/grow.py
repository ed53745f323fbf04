"""Lets the file system of a fresh root disk take all of its device, before it is first mounted.

The imager's ext4 images keep room for the descriptors of more block groups, and a new group needs
nothing else: the kernel makes its bitmaps and inode table when it first uses them, and beyond the
image's end a disk reads as zeros. The kernel's own resizing refuses file systems without backup
superblocks, which these are. Structures: Linux, Documentation/filesystems/ext4.
"""

from __future__ import annotations

import functools
import os
import struct

_BLOCK = 4096
_GROUP_BLOCKS = 8 * _BLOCK
_DESCRIPTOR = 64
_PER_BLOCK = _BLOCK // _DESCRIPTOR
_MAX_TABLE_BLOCKS = 128  # what the imager keeps free behind the superblock
_ONES = 0xFFFFFFFF
# What the imager writes: ext_attr, dir_index, sparse_super2; filetype, extents, 64bit, flex_bg;
# sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum.
_FEATURES = (0x228, 0x2C2, 0x46B)
# Group flags: no inode is in use and the table is zeros; the block bitmap is for the kernel to make.
_NO_INODES, _NO_BITMAP = 0x1 | 0x4, 0x2
_ALL_BLOCKS = (1 << _GROUP_BLOCKS) - 1
_SUPERBLOCK = 1024


def fill_device(device: str) -> None:
    """Grow the unmounted file system on `device` to its end, if it is a fresh one of the imager's.

    Raises:
        OSError: the device cannot be read or written.
    """
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        grow(fd, os.lseek(fd, 0, os.SEEK_END) // _BLOCK)
        os.fsync(fd)
    finally:
        os.close(fd)


def grow(fd: int, blocks: int) -> bool:
    """Make the file system in `fd` `blocks` long, or nearly so; whether anything was changed."""
    head = bytearray(os.pread(fd, _SUPERBLOCK, _SUPERBLOCK))
    if not _is_fresh(head):
        return False
    (inodes_each,) = struct.unpack_from("<I", head, 0x28)
    old = _joined(head, 0x4, 0x150)
    own = 2 + inodes_each * 256 // _BLOCK  # bitmaps and inode table of a group
    before, groups = -(-old // _GROUP_BLOCKS), -(-blocks // _GROUP_BLOCKS)
    if groups > before and 0 < blocks % _GROUP_BLOCKS <= 2 * own:
        groups -= 1  # the rest is too short for a group
        blocks = groups * _GROUP_BLOCKS
    table_before, table_after = -(-before // _PER_BLOCK), -(-groups // _PER_BLOCK)
    if blocks <= old or table_after > _MAX_TABLE_BLOCKS:
        return False
    groups_of = _Groups(fd, bytearray(os.pread(fd, table_after * _BLOCK, _BLOCK)), head[0x68:0x78])
    start = (before - 1) * _GROUP_BLOCKS
    groups_of.mark(before - 1, old - start, min(blocks - start, _GROUP_BLOCKS), used=False)
    groups_of.mark(0, 1 + table_before, 1 + table_after, used=True)
    free = min(blocks - start, _GROUP_BLOCKS) - (old - start) - (table_after - table_before)
    for group in range(before, groups):
        length = min(blocks - group * _GROUP_BLOCKS, _GROUP_BLOCKS)
        groups_of.add(group, length, own, inodes_each, last=group == groups - 1)
        free += length - own
    os.pwrite(fd, groups_of.table, _BLOCK)
    _put_split(head, 0x4, 0x150, blocks)
    _put_split(head, 0xC, 0x158, _joined(head, 0xC, 0x158) + free)
    (free_inodes,) = struct.unpack_from("<I", head, 0x10)
    struct.pack_into("<I", head, 0x0, groups * inodes_each)
    struct.pack_into("<I", head, 0x10, free_inodes + (groups - before) * inodes_each)
    struct.pack_into("<I", head, 0x3FC, crc32c(_ONES, head[:0x3FC]))
    os.pwrite(fd, head, _SUPERBLOCK)
    return True


class _Groups:
    """The group descriptors, in `table`, and the block bitmaps that they lead to."""

    def __init__(self, fd: int, table: bytearray, uuid: bytes | bytearray) -> None:
        self._fd = fd
        self.table = table
        self._seed = crc32c(_ONES, uuid)

    def mark(self, group: int, first: int, end: int, *, used: bool) -> None:
        """Mark blocks `first` to `end` of a group, all of which are marked otherwise."""
        self._set(group, ((1 << (end - first)) - 1) << first, used=used)
        at, more = group * _DESCRIPTOR, first - end if used else end - first
        low, high = (struct.unpack_from("<H", self.table, at + where)[0] for where in (0xC, 0x2C))
        free = (low | high << 16) + more
        struct.pack_into("<H", self.table, at + 0xC, free & 0xFFFF)
        struct.pack_into("<H", self.table, at + 0x2C, free >> 16)
        self._seal(group)

    def _set(self, group: int, bits: int, *, used: bool) -> None:
        """Set or clear these bits of a group's bitmap."""
        at = group * _DESCRIPTOR
        where = _joined(self.table, at, at + 0x20) * _BLOCK
        number = int.from_bytes(os.pread(self._fd, _BLOCK, where), "little")
        bitmap = ((number | bits) if used else (number & ~bits)).to_bytes(_BLOCK, "little")
        os.pwrite(self._fd, bitmap, where)
        check = crc32c(self._seed, bitmap)
        struct.pack_into("<H", self.table, at + 0x18, check & 0xFFFF)
        struct.pack_into("<H", self.table, at + 0x38, check >> 16)
        self._seal(group)

    def add(self, group: int, length: int, own: int, inodes: int, *, last: bool) -> None:
        """Describe a new group of `length` blocks, the first `own` being its bitmaps and inode table."""
        at, start = group * _DESCRIPTOR, group * _GROUP_BLOCKS
        self.table[at : at + _DESCRIPTOR] = bytes(_DESCRIPTOR)
        for number in range(3):
            _put_split(self.table, at + 4 * number, at + 0x20 + 4 * number, start + number)
        flags = _NO_INODES if last else _NO_INODES | _NO_BITMAP
        struct.pack_into("<HHHH", self.table, at + 0xC, length - own, inodes, 0, flags)
        struct.pack_into("<H", self.table, at + 0x1C, inodes)
        self._seal(group)
        if last:  # e2fsck wants the last group's bitmap to be there
            os.pwrite(self._fd, bytes(_BLOCK), start * _BLOCK)
            self._set(group, ((1 << own) - 1) | (-1 << length) & _ALL_BLOCKS, used=True)

    def _seal(self, group: int) -> None:
        at = group * _DESCRIPTOR
        struct.pack_into("<H", self.table, at + 0x1E, 0)
        sum_ = crc32c(crc32c(self._seed, struct.pack("<I", group)), self.table[at : at + _DESCRIPTOR])
        struct.pack_into("<H", self.table, at + 0x1E, sum_ & 0xFFFF)


def _is_fresh(head: bytes | bytearray) -> bool:
    """Whether this is the superblock of an image of the imager's that was never mounted for writing."""
    return (
        len(head) == 1024
        and struct.unpack_from("<H", head, 0x38)[0] == 0xEF53
        and struct.unpack_from("<III", head, 0x5C) == _FEATURES
        and struct.unpack_from("<I", head, 0x3FC)[0] == crc32c(_ONES, head[:0x3FC])
        and not any(head[0x2C:0x36])  # mount time, write time, mount count
    )


def _joined(data: bytes | bytearray, low: int, high: int) -> int:
    first, second = struct.unpack_from("<I", data, low)[0], struct.unpack_from("<I", data, high)[0]
    return int(first | second << 32)


def _put_split(data: bytearray, low: int, high: int, value: int) -> None:
    struct.pack_into("<I", data, low, value & _ONES)
    struct.pack_into("<I", data, high, value >> 32)


def crc32c(value: int, data: bytes | bytearray) -> int:
    """CRC-32C going on from `value`, without a final inversion, as ext4 uses it."""
    table = _table()
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value


@functools.cache
def _table() -> list[int]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        found.append(value)
    return found
