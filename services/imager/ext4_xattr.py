"""Extended attributes: in the inode's spare bytes if all fit, else in one block.

Source: Documentation/filesystems/ext4/attributes.rst and fs/ext4/{xattr,acl}.c of the kernel.
POSIX ACLs arrive in the form of the system call and are stored in ext4's own, shorter one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from services.common.errors import InvalidInput
from services.imager.ext4_format import BLOCK, EXTRA_ISIZE, INODE_SIZE

INLINE_AT: Final = 128 + EXTRA_ISIZE
_INLINE: Final = INODE_SIZE - INLINE_AT
_MAGIC: Final = struct.pack("<I", 0xEA020000)
_HEADER: Final = 32
CHECKSUM_AT: Final = 16
_MASK: Final = 0xFFFFFFFF
_ENTRY: Final = struct.Struct("<BBHIII")
_ACLS: Final = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_NAMESPACES: Final = {b"user.": 1, b"trusted.": 4, b"security.": 6}
# Tags of POSIX ACL entries, include/uapi/linux/posix_acl.h: with and without an id.
_NAMED_TAGS: Final = {0x02, 0x08}
_PLAIN_TAGS: Final = {0x01, 0x04, 0x10, 0x20}

Attributes = list[tuple[int, bytes, bytes]]  # (name index, name, value), sorted


def convert_xattrs(xattrs: Mapping[bytes, bytes]) -> Attributes:
    """The attributes that Linux has, in ext4's terms and order.

    Attributes of other systems (`com.apple.…`) are left out, as they are when a container engine
    unpacks the layer.

    Raises:
        InvalidInput: a name is empty or too long, or an ACL is malformed.
    """
    found: Attributes = []
    for full, value in xattrs.items():
        if full in _ACLS:
            found.append((_ACLS[full], b"", _convert_acl(full, value)))
            continue
        prefix = full[: full.find(b".") + 1]
        if prefix not in _NAMESPACES:
            continue
        name = full[len(prefix) :]
        if not 0 < len(name) <= 255 or b"\0" in name:
            raise InvalidInput(f"an extended attribute with a name of {len(name)} bytes", reason="BAD_XATTR")
        found.append((_NAMESPACES[prefix], name, value))
    return sorted(found, key=lambda item: (item[0], len(item[1]), item[1]))


def _convert_acl(name: bytes, value: bytes) -> bytes:
    if len(value) < 4 or (len(value) - 4) % 8 or struct.unpack_from("<I", value)[0] != 2:
        raise InvalidInput(f"{name.decode()} is not a POSIX ACL of version 2", reason="BAD_XATTR")
    out = struct.pack("<I", 1)
    for tag, permissions, identity in struct.iter_unpack("<HHI", value[4:]):
        if tag in _NAMED_TAGS:
            out += struct.pack("<HHI", tag, permissions, identity)
        elif tag in _PLAIN_TAGS:
            out += struct.pack("<HH", tag, permissions)
        else:
            raise InvalidInput(f"{name.decode()} has an entry with the unknown tag {tag}", reason="BAD_XATTR")
    return out


def pack_inline(attributes: Attributes) -> bytes | None:
    """The bytes after the inode's fixed fields, or None if they are too few."""
    area = bytearray(_INLINE - len(_MAGIC))
    if not _fill(area, attributes, start=0, hashed=False):
        return None
    return _MAGIC + bytes(area)


def pack_block(attributes: Attributes) -> bytearray:
    """One attribute block; its checksum is for the caller, who knows its number.

    Raises:
        InvalidInput: they do not fit one block.
    """
    block = bytearray(BLOCK)
    if not _fill(block, attributes, start=_HEADER, hashed=True):
        total = sum(len(name) + len(value) for _, name, value in attributes)
        raise InvalidInput(f"extended attributes of {total} bytes; at most 4 KiB fit", reason="BAD_XATTR")
    digest = 0
    at = _HEADER
    for _, name, _ in attributes:
        entry_hash = struct.unpack_from("<I", block, at + 12)[0]
        if entry_hash == 0:
            digest = 0
            break
        digest = ((digest << 16) ^ (digest >> 16) ^ entry_hash) & _MASK
        at += _ENTRY.size + (len(name) + 3 & ~3)
    struct.pack_into("<4sIII", block, 0, _MAGIC, 1, 1, digest)
    return block


def _fill(area: bytearray, attributes: Attributes, *, start: int, hashed: bool) -> bool:
    """Entries from `start` upwards, values from the end downwards, four zero bytes between them."""
    at, bottom = start, len(area)
    for index, name, value in attributes:
        padded = len(value) + 3 & ~3
        following = at + _ENTRY.size + (len(name) + 3 & ~3)
        bottom -= padded
        if following + 4 > bottom:
            return False
        area[bottom : bottom + len(value)] = value
        offset = bottom if value else 0
        entry_hash = _entry_hash(name, value) if hashed else 0
        _ENTRY.pack_into(area, at, len(name), index, offset, 0, len(value), entry_hash)
        area[at + _ENTRY.size : at + _ENTRY.size + len(name)] = name
        at = following
    return True


def _entry_hash(name: bytes, value: bytes) -> int:
    digest = 0
    for byte in name:
        digest = ((digest << 5) ^ (digest >> 27) ^ byte) & _MASK
    for (word,) in struct.iter_unpack("<I", value.ljust(len(value) + 3 & ~3, b"\0")):
        digest = ((digest << 16) ^ (digest >> 16) ^ word) & _MASK
    return digest
