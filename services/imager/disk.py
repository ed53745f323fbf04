"""Disks: the read-only ext4 of an image's layers, in the cache. A box writes into an overlay (`qcow2.py`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from services.common.errors import Corrupt, InvalidInput
from services.imager.cache import ImageCache
from services.imager.ext4 import WRITER_VERSION, Ext4Writer, ImageSize
from services.imager.layers import LayerMerger, LayerSource
from services.imager.limits import MIB, Cancel, Limits
from services.imager.progress import Progress, Report, silent

DEFAULT_FREE_MIB: Final = 1024
_CHUNK: Final = 1 << 20
_REPORT_BYTES: Final = 2 * MIB
OpenLayer = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBlob:
    """A layer in the cache."""

    digest: str
    size: int
    diff_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A raw, read-only ext4 image in the cache.

    Attributes:
        digest: `sha256:<hex>` over the layers' diff ids, the room left and the writer's version: it
            names the content, since the writer gives the same bytes for the same input.
    """

    path: Path
    digest: str
    size_bytes: int


def disk_key(diff_ids: Sequence[str], free_mib: int, *, read_only: bool = False) -> str:
    """Hex digits that name the disk of these layers."""
    format_name = "ext4, read-only" if read_only else "ext4"
    inputs = {
        "writer": WRITER_VERSION,
        "format": format_name,
        "diff_ids": list(diff_ids),
        "free_mib": free_mib,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def find_disk(cache: ImageCache, key: str) -> Disk | None:
    """The disk if it has been built; it counts as used now."""
    path = cache.root / "disks" / f"{key}.ext4"
    record = cache.read_record("disks", key)
    try:
        size = path.stat().st_size
        if record is None or record.get("size_bytes") != size:
            return None
        os.utime(path)
    except FileNotFoundError:
        return None
    return Disk(path=path, digest=f"sha256:{key}", size_bytes=size)


def build_disk(
    cache: ImageCache,
    layers: Sequence[LayerBlob],
    *,
    free_mib: int = DEFAULT_FREE_MIB,
    read_only: bool = False,
    limits: Limits,
    cancel: Cancel,
    report: Report = silent,
    open_layer: OpenLayer | None = None,
) -> Disk:
    """The disk of `layers`, lowest first, which are in the cache; built if it is not there yet.

    Blocks; use a thread. One process builds a disk, others wait for it.

    Args:
        free_mib: Room to leave for what a box writes.
        read_only: No box will ever write: no room at all, and the file system says so to every kernel.
        open_layer: Opens the layer with a digest, if not the cache does.

    Raises:
        Corrupt: a layer is damaged; it has been removed from the cache.
        InvalidInput: a layer is malformed; the message names it and the entry.
        Exhausted: the disk is full or a limit is passed; nothing is left behind.
        Cancelled: the caller cancelled.
    """
    if not 0 <= free_mib <= 1 << 20:
        raise InvalidInput(f"free_mib is {free_mib}; it must be 0 to {1 << 20}", reason="BAD_SIZE")
    free_mib = 0 if read_only else free_mib
    key = disk_key([layer.diff_id for layer in layers], free_mib, read_only=read_only)
    with cache.lock(f"disk-{key}", cancel):
        if (found := find_disk(cache, key)) is not None:
            return found
        path = cache.root / "disks" / f"{key}.ext4"
        with cache.writing(path) as file:
            size = write_disk(
                file,
                cache,
                layers,
                key,
                free_bytes=free_mib * MIB,
                read_only=read_only,
                limits=limits,
                cancel=cancel,
                report=report,
                open_layer=open_layer,
            )
        record: dict[str, Any] = {
            "diff_ids": [layer.diff_id for layer in layers],
            "free_mib": free_mib,
            "inodes": size.inodes,
            "size_bytes": size.size_bytes,
            "used_bytes": size.used_bytes,
            "writer": WRITER_VERSION,
        }
        cache.write_record("disks", key, record)
        return Disk(path=path, digest=f"sha256:{key}", size_bytes=size.size_bytes)


def write_disk(
    file: BinaryIO,
    cache: ImageCache,
    layers: Sequence[LayerBlob],
    key: str,
    *,
    free_bytes: int,
    read_only: bool = False,
    limits: Limits,
    cancel: Cancel,
    report: Report,
    open_layer: OpenLayer | None = None,
) -> ImageSize:
    """Merge the layers into an ext4 image in `file`, which is empty; `key` names it."""
    uuid, hash_seed = disk_seeds(key)
    with Ext4Writer(file, uuid=uuid, hash_seed=hash_seed) as writer:
        merger = LayerMerger(writer, limits, cancel)
        for layer in layers:
            with (open_layer or cache.open_layer)(layer.digest) as blob:
                counted = cast("BinaryIO", _Counting(blob, layer, report))
                try:
                    merger.apply(
                        LayerSource(digest=layer.digest, size=layer.size, diff_id=layer.diff_id, blob=counted)
                    )
                except Corrupt as error:
                    if error.reason in ("WRONG_SIZE", "WRONG_DIGEST"):
                        cache.blob_path(layer.digest).unlink(missing_ok=True)
                    raise
            report(_progress(layer, layer.size))
        report(Progress(subject="disk", action="finish", done=0, total=1))
        size = writer.finish(merger.tree, free_bytes=free_bytes, read_only=read_only)
        report(Progress(subject="disk", action="finish", done=1, total=1))
        return size


def content_digest(file: BinaryIO, cancel: Cancel) -> str:
    """`sha256:<hex>` of all that is in `file`, wherever it is positioned."""
    file.flush()
    digest, at = hashlib.sha256(), 0
    while data := os.pread(file.fileno(), _CHUNK, at):
        cancel.check()
        digest.update(data)
        at += len(data)
    return f"sha256:{digest.hexdigest()}"


def _progress(layer: LayerBlob, done: int) -> Progress:
    return Progress(subject=layer.digest, action="convert", done=done, total=layer.size, unit="bytes")


class _Counting:
    """A blob that reports how much of it has been read, the first time."""

    def __init__(self, blob: Any, layer: LayerBlob, report: Report) -> None:
        self._blob, self._layer, self._report = blob, layer, report
        self._count = self._reported = 0

    def read(self, size: int = -1) -> bytes:
        """As the file's own `read`."""
        data: bytes = self._blob.read(size)
        self._count += len(data)
        if self._count - self._reported >= _REPORT_BYTES:
            self._reported = self._count
            self._report(_progress(self._layer, self._count))
        return data

    def seek(self, position: int) -> int:
        """As the file's own `seek`."""
        moved: int = self._blob.seek(position)
        return moved


def disk_seeds(key: str) -> tuple[bytes, bytes]:
    """UUID and directory hash seed of the disk that `key` names."""
    seed = hashlib.sha256(f"voidbox ext4 {key}".encode()).digest()
    return _uuid(seed[:16]), seed[16:]


def _uuid(raw: bytes) -> bytes:
    """RFC 9562 version 8: the rest is ours."""
    value = bytearray(raw)
    value[6] = value[6] & 0x0F | 0x80
    value[8] = value[8] & 0x3F | 0x80
    return bytes(value)
