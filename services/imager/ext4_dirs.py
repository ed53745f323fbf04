"""Directory blocks: linear for what fits one block, hashed (htree) for larger directories.

Source: Documentation/filesystems/ext4/directory.rst and fs/ext4/{namei,hash}.c of the kernel. The
blocks come without their checksums: leaves carry an empty tail, index nodes are marked as such.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from services.common.errors import InvalidInput
from services.imager.ext4_format import BLOCK

_TAIL: Final = struct.pack("<IHBBI", 0, 12, 0, 0xDE, 0)
LEAF_CHECKED: Final = BLOCK - len(_TAIL)  # the bytes that a leaf's checksum covers
_USABLE: Final = LEAF_CHECKED
_ENTRY: Final = struct.Struct("<IHBB")
_DIRECTORY: Final = 2
_HALF_MD4: Final = 1
_ROOT_ENTRIES_AT: Final = 32
_NODE_ENTRIES_AT: Final = 8
_INDEX_ENTRY: Final = 8
_ROOT_LIMIT: Final = (BLOCK - _ROOT_ENTRIES_AT - 8) // _INDEX_ENTRY  # 8 bytes of checksum tail
_NODE_LIMIT: Final = (BLOCK - _NODE_ENTRIES_AT - 8) // _INDEX_ENTRY
_MASK: Final = 0xFFFFFFFF
_HASH_EOF: Final = 0x7FFFFFFF
_LANES: Final = 512  # names hashed at once: numbers of 4 KiB stay in the processor's cache


Name = tuple[bytes, int, int]  # name, inode, kind: plain tuples, there are as many as files


class DirectoryBlocks(NamedTuple):
    """The blocks of one directory, in order.

    Attributes:
        indexed: Whether the inode gets the index flag.
        index_nodes: Numbers (in `blocks`) of those that are index nodes, with the offset of their entries.
    """

    blocks: list[bytearray]
    indexed: bool
    index_nodes: dict[int, int]


def build_directory(inode: int, parent: int, names: Sequence[Name], hash_seed: bytes) -> DirectoryBlocks:
    """The blocks for `names`, which are sorted and unique.

    Raises:
        InvalidInput: more names than two index levels can hold.
    """
    dots = [(b".", inode, _DIRECTORY), (b"..", parent, _DIRECTORY)]
    if sum([8 + (len(name) + 3 & ~3) for name, _, _ in names]) + 24 <= _USABLE:
        return DirectoryBlocks([_leaf([*dots, *names])], indexed=False, index_nodes={})
    return _build_indexed(inode, parent, names, hash_seed)


def _leaf(names: Sequence[Name]) -> bytearray:
    block = bytearray(BLOCK)
    at = last = 0
    pack = _ENTRY.pack_into
    for name, inode, kind in names:
        length = 8 + (len(name) + 3 & ~3)
        pack(block, at, inode, length, len(name), kind)
        block[at + 8 : at + 8 + len(name)] = name
        last, at = at, at + length
    struct.pack_into("<H", block, last + 4, _USABLE - last)
    block[_USABLE:] = _TAIL
    return block


def _build_indexed(inode: int, parent: int, names: Sequence[Name], hash_seed: bytes) -> DirectoryBlocks:
    seed = struct.unpack("<4I", hash_seed)
    hashes = half_md4([name for name, _, _ in names], seed)
    ordered = sorted(zip(hashes, names, strict=True))
    leaves: list[tuple[int, bytearray]] = []
    batch: list[Name] = []
    size, first, previous = 0, 0, -1
    for value, name in ordered:
        length = 8 + (len(name[0]) + 3 & ~3)
        if size + length > _USABLE:
            leaves.append((first, _leaf(batch)))
            batch, size = [], 0
            # Bit 0 says that the block before ends with the same hash.
            first = value | (value == previous)
        batch.append(name)
        size += length
        previous = value
    leaves.append((first, _leaf(batch)))
    nodes = -(-len(leaves) // _NODE_LIMIT)
    if nodes > _ROOT_LIMIT:
        raise InvalidInput(f"a directory with {len(names)} names, more than ext4 can index")
    if len(leaves) <= _ROOT_LIMIT:
        pointers = [(value, 1 + i) for i, (value, _) in enumerate(leaves)]
        root = _index_root(inode, parent, pointers, levels=0)
        return DirectoryBlocks([root, *(leaf for _, leaf in leaves)], True, {0: _ROOT_ENTRIES_AT})
    blocks: list[bytearray] = []
    pointers = []
    for i in range(nodes):
        part = leaves[i * _NODE_LIMIT : (i + 1) * _NODE_LIMIT]
        base = 1 + nodes + i * _NODE_LIMIT
        pointers.append((part[0][0], 1 + i))
        blocks.append(_index_node([(value, base + k) for k, (value, _) in enumerate(part)]))
    root = _index_root(inode, parent, pointers, levels=1)
    index_nodes = {0: _ROOT_ENTRIES_AT} | {1 + i: _NODE_ENTRIES_AT for i in range(nodes)}
    return DirectoryBlocks([root, *blocks, *(leaf for _, leaf in leaves)], True, index_nodes)


def _index_root(inode: int, parent: int, pointers: list[tuple[int, int]], levels: int) -> bytearray:
    block = bytearray(BLOCK)
    struct.pack_into("<IHBB4s", block, 0, inode, 12, 1, _DIRECTORY, b".")
    struct.pack_into("<IHBB4s", block, 12, parent, BLOCK - 12, 2, _DIRECTORY, b"..")
    struct.pack_into("<IBBBB", block, 24, 0, _HALF_MD4, 8, levels, 0)
    _put_pointers(block, _ROOT_ENTRIES_AT, _ROOT_LIMIT, pointers)
    return block


def _index_node(pointers: list[tuple[int, int]]) -> bytearray:
    block = bytearray(BLOCK)
    struct.pack_into("<IHBB", block, 0, 0, BLOCK, 0, 0)
    _put_pointers(block, _NODE_ENTRIES_AT, _NODE_LIMIT, pointers)
    return block


def _put_pointers(block: bytearray, at: int, limit: int, pointers: list[tuple[int, int]]) -> None:
    """The first pointer's hash is implied; limit and count take its place."""
    struct.pack_into("<HHI", block, at, limit, len(pointers), pointers[0][1])
    for i, (value, number) in enumerate(pointers[1:], 1):
        struct.pack_into("<II", block, at + i * _INDEX_ENTRY, value, number)


def index_checked(block: bytearray, entries_at: int) -> tuple[bytes, int]:
    """What the checksum of an index node covers, and where it is stored."""
    limit, count = struct.unpack_from("<HH", block, entries_at)
    tail = entries_at + limit * _INDEX_ENTRY
    return bytes(block[: entries_at + count * _INDEX_ENTRY]) + bytes(block[tail : tail + 4]) + bytes(
        4
    ), tail + 4


def half_md4(names: Sequence[bytes], seed: tuple[int, ...]) -> list[int]:
    """The major hashes of names: half MD4 over unsigned bytes, bit 0 clear.

    Many at once: each state is one long number with a name in every 64 bits, of which the upper
    32 catch what additions carry. 1 us a name instead of 10.
    """
    found = [0] * len(names)
    groups: dict[int, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault(-(-len(name) // 32), []).append(place)
    for rounds, places in groups.items():
        for at in range(0, len(places), _LANES):
            some = places[at : at + _LANES]
            values = _half_md4([names[place] for place in some], rounds, seed)
            for place, value in zip(some, values, strict=True):
                value &= ~1
                found[place] = (_HASH_EOF - 1) << 1 if value == _HASH_EOF << 1 else value
    return found


def _half_md4(names: list[bytes], rounds: int, seed: tuple[int, ...]) -> tuple[int, ...]:
    """The second word of the state after all rounds, for each of `names`, which all need as many."""
    count = len(names)
    ones = int.from_bytes(b"\1\0\0\0\0\0\0\0" * count, "little")
    a, b, c, d = (ones * word for word in seed)
    for number in range(rounds):
        padded = b"".join(
            [_padded(name[32 * number : 32 * number + 32], len(name) - 32 * number) for name in names]
        )
        words = []
        lane = bytearray(8 * count)
        for word in range(8):
            for byte in range(4):
                lane[3 - byte :: 8] = padded[4 * word + byte :: 32]
            words.append(int.from_bytes(lane, "little"))
        a, b, c, d = _half_md4_round(a, b, c, d, words, ones)
    return struct.unpack(f"<{2 * count}I", b.to_bytes(8 * count, "little"))[::2]


def _padded(piece: bytes, remaining: int) -> bytes:
    """Eight big-endian words; what is missing is filled with the length, in a word begun from its top."""
    if len(piece) == 32:
        return piece
    pad = bytes((remaining,))
    whole = len(piece) & ~3
    begun = piece[whole:]
    word = pad * (4 - len(begun)) + begun if begun else b""
    return (piece[:whole] + word).ljust(32, pad)


_MD4_2: Final = 0x5A827999
_MD4_3: Final = 0x6ED9EBA1


def _half_md4_round(a0: int, b0: int, c0: int, d0: int, words: list[int],
                    ones: int) -> tuple[int, int, int, int]:  # fmt: skip
    """24 steps, written out: a loop takes several times as long. `ones` has a 1 for each name."""
    mask, md4_2, md4_3 = ones * _MASK, ones * _MD4_2, ones * _MD4_3
    w0, w1, w2, w3, w4, w5, w6, w7 = words
    a, b, c, d = a0, b0, c0, d0
    x = (a + (d ^ (b & (c ^ d))) + w0) & mask
    a = (x << 3 | x >> 29) & mask
    x = (d + (c ^ (a & (b ^ c))) + w1) & mask
    d = (x << 7 | x >> 25) & mask
    x = (c + (b ^ (d & (a ^ b))) + w2) & mask
    c = (x << 11 | x >> 21) & mask
    x = (b + (a ^ (c & (d ^ a))) + w3) & mask
    b = (x << 19 | x >> 13) & mask
    x = (a + (d ^ (b & (c ^ d))) + w4) & mask
    a = (x << 3 | x >> 29) & mask
    x = (d + (c ^ (a & (b ^ c))) + w5) & mask
    d = (x << 7 | x >> 25) & mask
    x = (c + (b ^ (d & (a ^ b))) + w6) & mask
    c = (x << 11 | x >> 21) & mask
    x = (b + (a ^ (c & (d ^ a))) + w7) & mask
    b = (x << 19 | x >> 13) & mask
    x = (a + (b & c) + ((b ^ c) & d) + md4_2 + w1) & mask
    a = (x << 3 | x >> 29) & mask
    x = (d + (a & b) + ((a ^ b) & c) + md4_2 + w3) & mask
    d = (x << 5 | x >> 27) & mask
    x = (c + (d & a) + ((d ^ a) & b) + md4_2 + w5) & mask
    c = (x << 9 | x >> 23) & mask
    x = (b + (c & d) + ((c ^ d) & a) + md4_2 + w7) & mask
    b = (x << 13 | x >> 19) & mask
    x = (a + (b & c) + ((b ^ c) & d) + md4_2 + w0) & mask
    a = (x << 3 | x >> 29) & mask
    x = (d + (a & b) + ((a ^ b) & c) + md4_2 + w2) & mask
    d = (x << 5 | x >> 27) & mask
    x = (c + (d & a) + ((d ^ a) & b) + md4_2 + w4) & mask
    c = (x << 9 | x >> 23) & mask
    x = (b + (c & d) + ((c ^ d) & a) + md4_2 + w6) & mask
    b = (x << 13 | x >> 19) & mask
    x = (a + (b ^ c ^ d) + md4_3 + w3) & mask
    a = (x << 3 | x >> 29) & mask
    x = (d + (a ^ b ^ c) + md4_3 + w7) & mask
    d = (x << 9 | x >> 23) & mask
    x = (c + (d ^ a ^ b) + md4_3 + w2) & mask
    c = (x << 11 | x >> 21) & mask
    x = (b + (c ^ d ^ a) + md4_3 + w6) & mask
    b = (x << 15 | x >> 17) & mask
    x = (a + (b ^ c ^ d) + md4_3 + w1) & mask
    a = (x << 3 | x >> 29) & mask
    x = (d + (a ^ b ^ c) + md4_3 + w5) & mask
    d = (x << 9 | x >> 23) & mask
    x = (c + (d ^ a ^ b) + md4_3 + w0) & mask
    c = (x << 11 | x >> 21) & mask
    x = (b + (c ^ d ^ a) + md4_3 + w4) & mask
    b = (x << 15 | x >> 17) & mask
    return (a0 + a) & mask, (b0 + b) & mask, (c0 + c) & mask, (d0 + d) & mask
