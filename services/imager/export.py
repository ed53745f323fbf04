"""Exports of a cached image: its ext4 disk, a tar archive, or an initramfs, as a stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO, Final

from services.imager.cache import COLLECT_LOCK
from services.imager.compression import Compression, compressing
from services.imager.cpiowrite import write_initramfs
from services.imager.flatten import Spool, flatten
from services.imager.images import CachedImage
from services.imager.limits import Cancel
from services.imager.pull import ImageStore
from services.imager.tarwrite import write_tar
from services.imager.tree import Tree

PIECE: Final = 64 << 10


class ExportFormat(Enum):
    """What an image is exported as."""

    EXT4 = "ext4"
    TAR = "tar"
    INITRAMFS = "initramfs"


_WRITERS: Final[dict[ExportFormat, Callable[[Tree, Spool, BinaryIO], None]]] = {
    ExportFormat.TAR: write_tar,
    ExportFormat.INITRAMFS: write_initramfs,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One export of one image."""

    store: ImageStore
    image: CachedImage
    format: ExportFormat
    compression: Compression

    @property
    def is_plain_disk(self) -> bool:
        """Whether it is a file of the cache as it is, see `open_disk`."""
        return self.format is ExportFormat.EXT4 and self.compression == "none"

    def open_disk(self, cancel: Cancel) -> BinaryIO:
        """The image's disk, built if it is not there. Blocks."""
        return self.store.disk(self.image, cancel=cancel).path.open("rb", buffering=0)

    def write(self, out: BinaryIO, cancel: Cancel) -> None:
        """Write it to `out`, which need not seek. Blocks.

        Raises:
            Corrupt: a layer is missing or damaged.
            InvalidInput: a layer is malformed, or the format cannot hold the image.
            Exhausted: the disk is full.
            Cancelled: the caller cancelled.
            BrokenPipeError: nobody reads `out` any more.
        """
        with compressing(out, self.compression) as target:
            if self.format is ExportFormat.EXT4:
                with self.open_disk(cancel) as disk:
                    while data := disk.read(1 << 20):
                        cancel.check()
                        target.write(data)
                return
            cache = self.store.cache
            with cache.lock(COLLECT_LOCK, cancel, shared=True), cache.scratch() as file:
                tree, spool = flatten(cache, self.image.layers, file, self.store.limits, cancel)
                _WRITERS[self.format](tree, spool, target)


def pieces(file: BinaryIO) -> Iterator[bytes | int]:
    """A sparse file: its data, at most `PIECE` at once, and its holes as their lengths. Blocks."""
    handle = file.fileno()
    size = os.fstat(handle).st_size
    at = 0
    while at < size:
        start = _seek(handle, at, os.SEEK_DATA, size)
        if start > at:
            yield start - at
        end = _seek(handle, start, os.SEEK_HOLE, size)
        while start < end:
            data = os.pread(handle, min(PIECE, end - start), start)
            start += len(data)
            yield data
        at = end


def _seek(handle: int, at: int, whence: int, size: int) -> int:
    try:
        return min(os.lseek(handle, at, whence), size)
    except OSError:  # ENXIO: nothing but a hole behind `at`
        return size
