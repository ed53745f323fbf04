"""The layers of an image merged to one tree, its file contents in a nameless temporary file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO, Final

from services.imager.cache import ImageCache, disk_errors
from services.imager.disk import LayerBlob
from services.imager.layers import BLOCK_SIZE, LayerMerger, LayerSource
from services.imager.limits import Cancel, Limits
from services.imager.tree import Node, Tree

_CHUNK: Final = 1 << 20


class Spool:
    """A `DataSink` whose contents can be read again; blocks are counted from the start of `file`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._next = 0

    def store(self, chunks: Iterator[bytes | memoryview], length: int) -> int:
        """Write `length` bytes from a new block on; return its number."""
        first = self._next
        self._file.seek(first * BLOCK_SIZE)
        for chunk in chunks:
            self._file.write(chunk)
        self._next = first + -(-length // BLOCK_SIZE)
        return first

    def store_piece(self, data: bytes | memoryview) -> int:
        """As `store`, of content that is in one piece."""
        return self.store(iter((data,)), len(data))

    def fragments(self, node: Node) -> list[tuple[int, int]]:
        """Where in the file `node` there is data, as (offset, length); the rest is holes."""
        found = []
        for extent in node.extents:
            start = extent.logical * BLOCK_SIZE
            found.append((start, min(extent.length * BLOCK_SIZE, node.size - start)))
        return found

    def data(self, node: Node) -> Iterator[bytes]:
        """The fragments' bytes, one after the other."""
        for extent, (_, length) in zip(node.extents, self.fragments(node), strict=True):
            self._file.seek(extent.physical * BLOCK_SIZE)
            while length:
                piece = self._file.read(min(length, _CHUNK))
                if not piece:  # the last block of the last file may be short
                    piece = bytes(min(length, BLOCK_SIZE))
                yield piece
                length -= len(piece)

    def content(self, node: Node) -> Iterator[bytes]:
        """All bytes of the file, holes as zeros."""
        at = 0
        data = self.data(node)
        for offset, length in self.fragments(node):
            yield from _zeros(offset - at)
            at = offset + length
            while length:
                piece = next(data)
                length -= len(piece)
                yield piece
        yield from _zeros(node.size - at)


def _zeros(count: int) -> Iterator[bytes]:
    while count > 0:
        yield bytes(min(count, _CHUNK))
        count -= _CHUNK


def flatten(
    cache: ImageCache, layers: Sequence[LayerBlob], file: BinaryIO, limits: Limits, cancel: Cancel
) -> tuple[Tree, Spool]:
    """Merge `layers`, lowest first, with the contents in `file`, which is empty.

    Raises:
        Corrupt: a layer is missing or damaged.
        InvalidInput: a layer is malformed.
        Exhausted: the disk is full or a limit is passed.
        Cancelled: the caller cancelled.
    """
    spool = Spool(file)
    merger = LayerMerger(spool, limits, cancel)
    for layer in layers:
        with cache.open_layer(layer.digest) as blob, disk_errors(cache.root / "tmp"):
            merger.apply(LayerSource(digest=layer.digest, size=layer.size, diff_id=layer.diff_id, blob=blob))
    return merger.tree, spool
