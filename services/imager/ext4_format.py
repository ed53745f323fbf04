"""The on-disk structures of ext4 that the writer needs, packed; no I/O.

Source: the Linux kernel's Documentation/filesystems/ext4 and fs/ext4/ext4.h. Block size 4096,
inode size 256, 64-byte group descriptors, metadata checksums. Features and why:

- `sparse_super2` without backup superblocks: data runs through all groups without a gap, and the
  image is a cache entry that can be made again.
- `flex_bg`: all inode tables and bitmaps lie behind the data, so data can be written before its
  amount is known.
- no journal: the image is read-only in the cache, and a box's overlay is thrown away with the box.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from services.imager.crc32c import crc32c

BLOCK: Final = 4096
INODE_SIZE: Final = 256
EXTRA_ISIZE: Final = 32
INODES_PER_BLOCK: Final = BLOCK // INODE_SIZE
GROUP_BLOCKS: Final = 8 * BLOCK
MAX_GROUP_INODES: Final = 8 * BLOCK
GROUP_DESC_SIZE: Final = 64
GROUPS_PER_DESC_BLOCK: Final = BLOCK // GROUP_DESC_SIZE
ROOT_INODE: Final = 2
FIRST_INODE: Final = 11  # lost+found
ALL_ONES: Final = 0xFFFFFFFF

COMPAT: Final = 0x8 | 0x20 | 0x200  # ext_attr, dir_index, sparse_super2
INCOMPAT: Final = 0x2 | 0x40 | 0x80 | 0x200  # filetype, extents, 64bit, flex_bg
# sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum
RO_COMPAT: Final = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400
READ_ONLY: Final = 0x1000  # of RO_COMPAT: EXT4_FEATURE_RO_COMPAT_READONLY

EXTENTS_FLAG: Final = 0x80000
INDEX_FLAG: Final = 0x1000
INODE_ZEROED: Final = 0x4
INODE_UNINIT: Final = 0x1
BLOCK_UNINIT: Final = 0x2

SUPERBLOCK_OFFSET: Final = 1024
SUPERBLOCK_SIZE: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The numbers that describe a whole file system.

    Attributes:
        blocks: Length in blocks.
        inodes_per_group: A multiple of 16, at most 32768.
        free_blocks: Not used by anything.
        free_inodes: Not used by anything.
        uuid: 16 bytes; also seeds all checksums.
        hash_seed: 16 bytes, for hashed directories.
        read_only: No kernel may mount it for writing.
    """

    blocks: int
    inodes_per_group: int
    free_blocks: int
    free_inodes: int
    uuid: bytes
    hash_seed: bytes
    read_only: bool = False

    @property
    def groups(self) -> int:
        """How many block groups there are; the last may be short."""
        return -(-self.blocks // GROUP_BLOCKS)

    @property
    def desc_blocks(self) -> int:
        """Blocks of the group descriptor table."""
        return -(-self.groups // GROUPS_PER_DESC_BLOCK)

    @property
    def table_blocks(self) -> int:
        """Blocks of one group's inode table."""
        return self.inodes_per_group // INODES_PER_BLOCK

    @property
    def checksum_seed(self) -> int:
        """Where all checksums but the superblock's begin."""
        return crc32c(ALL_ONES, self.uuid)


def pack_superblock(geometry: Geometry) -> bytes:
    """The 1024 bytes of the superblock. All times are 0: the same input gives the same image."""
    block = bytearray(SUPERBLOCK_SIZE)
    put = struct.pack_into
    put("<IIIII", block, 0x0, geometry.groups * geometry.inodes_per_group, geometry.blocks & ALL_ONES, 0,
        geometry.free_blocks & ALL_ONES, geometry.free_inodes)  # fmt: skip
    put("<IIIIII", block, 0x14, 0, 2, 2, GROUP_BLOCKS, GROUP_BLOCKS, geometry.inodes_per_group)
    put("<HHHHHH", block, 0x34, 0, 0xFFFF, 0xEF53, 1, 1, 0)  # never a check by mount count; clean; continue
    put("<III", block, 0x48, 0, 1, 0)  # Linux, dynamic revision
    put("<IHH", block, 0x54, FIRST_INODE, INODE_SIZE, 0)
    ro_compat = RO_COMPAT | (READ_ONLY if geometry.read_only else 0)
    put("<III", block, 0x5C, COMPAT, INCOMPAT, ro_compat)
    block[0x68:0x78] = geometry.uuid
    block[0xEC:0xFC] = geometry.hash_seed
    put("<BBH", block, 0xFC, 1, 0, GROUP_DESC_SIZE)  # half MD4
    put("<I", block, 0x100, 0xC)  # mount options user_xattr, acl
    put("<III", block, 0x150, geometry.blocks >> 32, 0, geometry.free_blocks >> 32)
    put("<HHI", block, 0x15C, EXTRA_ISIZE, EXTRA_ISIZE, 2)  # unsigned directory hash
    put("<BB", block, 0x174, 4, 1)  # 16 groups to a flex group; crc32c
    put("<I", block, 0x3FC, crc32c(ALL_ONES, block[:0x3FC]))
    return bytes(block)


def unpack_superblock(block: bytes) -> Geometry:
    """The geometry of a file system that this module packed.

    Raises:
        ValueError: it is not one of ours, or damaged.
    """
    if len(block) != SUPERBLOCK_SIZE or struct.unpack_from("<H", block, 0x38)[0] != 0xEF53:
        raise ValueError("no ext4 superblock")
    if struct.unpack_from("<I", block, 0x3FC)[0] != crc32c(ALL_ONES, block[:0x3FC]):
        raise ValueError("the ext4 superblock is damaged")
    compat, incompat, ro_compat = struct.unpack_from("<III", block, 0x5C)
    if (compat, incompat, ro_compat & ~READ_ONLY) != (COMPAT, INCOMPAT, RO_COMPAT):
        raise ValueError("the ext4 file system has other features than this version writes")
    blocks_high, _, free_high = struct.unpack_from("<III", block, 0x150)
    return Geometry(
        blocks=struct.unpack_from("<I", block, 4)[0] | blocks_high << 32,
        inodes_per_group=struct.unpack_from("<I", block, 0x28)[0],
        free_blocks=struct.unpack_from("<I", block, 0xC)[0] | free_high << 32,
        free_inodes=struct.unpack_from("<I", block, 0x10)[0],
        uuid=block[0x68:0x78],
        hash_seed=block[0xEC:0xFC],
        read_only=bool(ro_compat & READ_ONLY),
    )


@dataclass(slots=True, kw_only=True)
class Group:
    """One group descriptor; the checksums of the bitmaps are 0 where their group is not initialised."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    free_blocks: int
    free_inodes: int
    directories: int = 0
    unused_inodes: int = 0
    flags: int = INODE_ZEROED
    block_bitmap_csum: int = 0
    inode_bitmap_csum: int = 0


_GROUP: Final = struct.Struct("<IIIHHHHIHHHHIIIHHHHIHHI")
_GROUP_CSUM_AT: Final = 0x1E


def pack_group(group: Group, index: int, seed: int) -> bytes:
    """The 64 bytes of a descriptor, with its checksum."""
    raw = bytearray(
        _GROUP.pack(
            group.block_bitmap & ALL_ONES, group.inode_bitmap & ALL_ONES, group.inode_table & ALL_ONES,
            group.free_blocks & 0xFFFF, group.free_inodes & 0xFFFF, group.directories & 0xFFFF,
            group.flags, 0, group.block_bitmap_csum & 0xFFFF, group.inode_bitmap_csum & 0xFFFF,
            group.unused_inodes & 0xFFFF, 0,
            group.block_bitmap >> 32, group.inode_bitmap >> 32, group.inode_table >> 32,
            group.free_blocks >> 16, group.free_inodes >> 16, group.directories >> 16,
            group.unused_inodes >> 16, 0, group.block_bitmap_csum >> 16, group.inode_bitmap_csum >> 16, 0,
        )
    )  # fmt: skip
    checksum = crc32c(crc32c(seed, struct.pack("<I", index)), raw)
    struct.pack_into("<H", raw, _GROUP_CSUM_AT, checksum & 0xFFFF)
    return bytes(raw)


def unpack_group(raw: bytes) -> Group:
    """A descriptor from its 64 bytes."""
    (block_bitmap, inode_bitmap, inode_table, free_blocks, free_inodes, directories, flags, _, block_csum,
     inode_csum, unused, _, block_bitmap_hi, inode_bitmap_hi, inode_table_hi, free_blocks_hi, free_inodes_hi,
     directories_hi, unused_hi, _, block_csum_hi, inode_csum_hi, _) = _GROUP.unpack(raw)  # fmt: skip
    return Group(
        block_bitmap=block_bitmap | block_bitmap_hi << 32,
        inode_bitmap=inode_bitmap | inode_bitmap_hi << 32,
        inode_table=inode_table | inode_table_hi << 32,
        free_blocks=free_blocks | free_blocks_hi << 16,
        free_inodes=free_inodes | free_inodes_hi << 16,
        directories=directories | directories_hi << 16,
        unused_inodes=unused | unused_hi << 16,
        flags=flags,
        block_bitmap_csum=block_csum | block_csum_hi << 16,
        inode_bitmap_csum=inode_csum | inode_csum_hi << 16,
    )


def inode_seed(seed: int, number: int) -> int:
    """Where checksums of what belongs to inode `number` (generation 0) begin."""
    return crc32c(seed, struct.pack("<II", number, 0))
