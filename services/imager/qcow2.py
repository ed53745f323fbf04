"""Writable overlays in QEMU's qcow2 format, written without starting `qemu-img`.

Source: docs/interop/qcow2.txt of QEMU. Version 3, clusters of 64 KiB, refcounts of 16 bits.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

from services.common.errors import AlreadyExists, InvalidInput
from services.imager.cache import disk_errors

_CLUSTER_BITS: Final = 16
_CLUSTER: Final = 1 << _CLUSTER_BITS
_BYTES_PER_L1: Final = _CLUSTER * (_CLUSTER // 8)  # an L2 table fills a cluster
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_BACKING_FORMAT: Final = 0xE2792ACA


def create_overlay(base: Path, target: Path, size_bytes: int | None = None) -> None:
    """Make `target` an empty qcow2 image over the raw image `base`; takes about a millisecond.

    Args:
        base: Absolute path, stored in the overlay.
        target: Must not exist; its directory must.
        size_bytes: Length of the overlay; that of `base` if None, never less.

    Raises:
        AlreadyExists: `target` exists.
        InvalidInput: the size or the path is impossible.
        Exhausted: the disk is full; nothing is left behind.
    """
    name = os.fsencode(base)
    base_size = base.stat().st_size
    size = base_size if size_bytes is None else size_bytes
    if not base.is_absolute() or len(name) > 1023:
        raise InvalidInput(f"{base} must be an absolute path of at most 1023 bytes", path=base)
    if size < base_size or size % 512:
        raise InvalidInput(
            f"an overlay of {size} bytes over {base}, which has {base_size}; "
            "it must be as long at least and a multiple of 512",
            reason="BAD_SIZE",
        )
    image = _overlay_image(name, size)
    try:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise AlreadyExists(f"{target} exists", path=target) from error
    try:
        with disk_errors(target), os.fdopen(handle, "wb") as file:
            file.write(image)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _overlay_image(base: bytes, size: int) -> bytes:
    """Header, refcount table, one refcount block, L1 table; no guest cluster yet."""
    l1_entries = -(-size // _BYTES_PER_L1)
    l1_clusters = -(-8 * l1_entries // _CLUSTER)
    clusters = 3 + l1_clusters
    format_name = b"raw"
    extensions = struct.pack(">II8s", _BACKING_FORMAT, len(format_name), format_name) + struct.pack(
        ">II", 0, 0
    )
    base_at = _HEADER.size + len(extensions)
    header = _HEADER.pack(
        b"QFI\xfb", 3, base_at, len(base), _CLUSTER_BITS, size, 0, l1_entries, 3 * _CLUSTER, 1 * _CLUSTER,
        1, 0, 0, 0, 0, 0, 4, _HEADER.size,
    )  # fmt: skip
    image = bytearray(clusters * _CLUSTER)
    image[: base_at + len(base)] = header + extensions + base
    struct.pack_into(">Q", image, _CLUSTER, 2 * _CLUSTER)
    for cluster in range(clusters):
        struct.pack_into(">H", image, 2 * _CLUSTER + 2 * cluster, 1)
    return bytes(image)
