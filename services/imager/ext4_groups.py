"""Block groups: how many, and their bitmaps and descriptors."""

from __future__ import annotations

from typing import Final

from services.common.errors import InvalidInput
from services.imager.crc32c import crc32c_rows
from services.imager.ext4_format import (
    BLOCK,
    GROUP_BLOCKS,
    GROUPS_PER_DESC_BLOCK,
    INODES_PER_BLOCK,
    MAX_GROUP_INODES,
    Geometry,
    Group,
    pack_group,
)

RESERVED_DESC_BLOCKS: Final = 128
DATA_START: Final = 1 + RESERVED_DESC_BLOCKS
MAX_BLOCKS: Final = RESERVED_DESC_BLOCKS * GROUPS_PER_DESC_BLOCK * GROUP_BLOCKS
SPARE_INODES: Final = 1024
DEFAULT_GROUP_INODES: Final = 8192  # one for 16 KiB, as mke2fs does


def plan_geometry(*, data_end: int, used_inodes: int, size_bytes: int | None, free_bytes: int, uuid: bytes,
                  hash_seed: bytes, read_only: bool = False) -> Geometry:  # fmt: skip
    """The smallest file system that holds everything and is as large as asked; nothing counted as free yet.

    Args:
        data_end: The block after all that is not part of a group's tables.
        used_inodes: Number of the last inode in use.
        size_bytes: Length asked for; as small as possible if None.
        free_bytes: Room to leave, if `size_bytes` is None.
        read_only: Nothing will be added: no spare inodes.

    Raises:
        InvalidInput: it cannot be as small, or as large, as asked.
    """
    wanted = -(-(used_inodes + (0 if read_only else SPARE_INODES)) // INODES_PER_BLOCK) * INODES_PER_BLOCK
    least = INODES_PER_BLOCK if read_only else DEFAULT_GROUP_INODES
    asked = 0 if size_bytes is None else size_bytes // BLOCK
    groups = max(1, -(-asked // GROUP_BLOCKS), -(-wanted // MAX_GROUP_INODES))
    while True:
        share = -(-wanted // groups)
        per_group = max(least, -(-share // INODES_PER_BLOCK) * INODES_PER_BLOCK)
        end = data_end + groups * (2 + per_group // INODES_PER_BLOCK)
        end += free_bytes // BLOCK if size_bytes is None else 0
        blocks = max(asked, end, (groups - 1) * GROUP_BLOCKS + 1)
        if -(-blocks // GROUP_BLOCKS) == groups:
            break
        groups = -(-blocks // GROUP_BLOCKS)
    if size_bytes is not None and blocks > asked:
        raise InvalidInput(
            f"the image needs {blocks * BLOCK} bytes, {size_bytes} were asked for",
            reason="SIZE_TOO_SMALL",
            needed=blocks * BLOCK,
        )
    if blocks > MAX_BLOCKS:
        raise InvalidInput(
            f"an ext4 image of {blocks * BLOCK} bytes; at most {MAX_BLOCKS * BLOCK} are possible",
            reason="SIZE_TOO_LARGE",
        )
    return Geometry(
        blocks=blocks,
        inodes_per_group=per_group,
        free_blocks=0,
        free_inodes=groups * per_group - used_inodes,
        uuid=uuid,
        hash_seed=hash_seed,
        read_only=read_only,
    )


class GroupTables:
    """Bitmaps and descriptors of all groups, whose metadata lies together from block `start` on.

    Attributes:
        bitmaps: All block bitmaps, then all inode bitmaps; the inode tables come next.
        descriptors: The group descriptor table.
        free_blocks: In the whole file system.
        end: The block after the last inode table.
    """

    def __init__(self, geometry: Geometry, *, start: int, used: list[tuple[int, int]], used_inodes: int,
                 directories: list[int]) -> None:  # fmt: skip
        groups, per_group, seed = geometry.groups, geometry.inodes_per_group, geometry.checksum_seed
        tables = start + 2 * groups
        self.end = tables + groups * geometry.table_blocks
        blocks = bytearray(groups * BLOCK)
        for first, count in [(0, 1 + geometry.desc_blocks), *used, (start, self.end - start)]:
            set_bits(blocks, first, count)
        set_bits(blocks, geometry.blocks, groups * GROUP_BLOCKS - geometry.blocks)
        inodes = bytearray(groups * BLOCK)
        taken = [min(max(used_inodes - group * per_group, 0), per_group) for group in range(groups)]
        for group in range(groups):
            set_bits(inodes, group * GROUP_BLOCKS, taken[group])
            set_bits(inodes, group * GROUP_BLOCKS + per_group, GROUP_BLOCKS - per_group)
        block_sums = crc32c_rows(seed, blocks, BLOCK, BLOCK)
        inode_sums = crc32c_rows(seed, inodes, BLOCK, per_group // 8)
        self.free_blocks = 0
        packed = bytearray()
        for group in range(groups):
            free = GROUP_BLOCKS - count_bits(blocks, group)
            self.free_blocks += free
            descriptor = Group(
                block_bitmap=start + group,
                inode_bitmap=start + groups + group,
                inode_table=tables + group * geometry.table_blocks,
                free_blocks=free,
                free_inodes=per_group - taken[group],
                directories=directories[group],
                unused_inodes=per_group - taken[group],
                block_bitmap_csum=block_sums[group],
                inode_bitmap_csum=inode_sums[group],
            )
            packed += pack_group(descriptor, group, seed)
        self.descriptors = bytes(packed)
        self.bitmaps = bytes(blocks + inodes)


def set_bits(bitmap: bytearray, first: int, count: int) -> None:
    """Set `count` bits from bit `first` on, least significant first."""
    end = first + count
    while first < end and first % 8:
        bitmap[first // 8] |= 1 << first % 8
        first += 1
    whole = (end - first) // 8
    bitmap[first // 8 : first // 8 + whole] = b"\xff" * whole
    for bit in range(first + 8 * whole, end):
        bitmap[bit // 8] |= 1 << bit % 8


def count_bits(bitmap: bytes | bytearray, group: int) -> int:
    """How many bits of one group's block are set."""
    return int.from_bytes(bitmap[group * BLOCK : (group + 1) * BLOCK], "little").bit_count()


def gaps(ranges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """What `ranges` (sorted, apart) leave of `start` to `end`, as (first, count)."""
    found = []
    for first, count in ranges:
        if first > start:
            found.append((start, first - start))
        start = first + count
    if end > start:
        found.append((start, end - start))
    return found
