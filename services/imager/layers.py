"""Applies layers to a tree, in order, file data going straight to where it will stay.

The data of a file that a later entry or layer replaces stays behind as free blocks and is made a
hole at the end (`ext4.py`): layers need only be read once, forwards, with nothing kept twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, Protocol

from services.common.errors import Corrupt, Exhausted, InvalidInput, VoidboxError
from services.imager import tarstream
from services.imager.bytestream import ByteStream
from services.imager.decompress import LayerReader
from services.imager.limits import Cancel, Limits
from services.imager.tarstream import TarEntry
from services.imager.tree import Extent, Kind, Node, Tree

BLOCK_SIZE: Final = 4096
MAX_FILE_BYTES: Final = (1 << 32) * BLOCK_SIZE - BLOCK_SIZE  # block numbers in extents are 32-bit
MAX_LINK_TARGET: Final = 4095  # PATH_MAX less its NUL
_LATE_LINK_PASSES: Final = 16

_KINDS: Final = {
    tarstream.FILE: Kind.FILE,
    tarstream.DIRECTORY: Kind.DIRECTORY,
    tarstream.SYMLINK: Kind.SYMLINK,
    tarstream.CHARDEV: Kind.CHARDEV,
    tarstream.BLOCKDEV: Kind.BLOCKDEV,
    tarstream.FIFO: Kind.FIFO,
}


class DataSink(Protocol):
    """Where file contents go."""

    def store(self, chunks: Iterator[bytes | memoryview], length: int) -> int:
        """Write `length` bytes from `chunks` from a new block on and return its number."""

    def store_piece(self, data: bytes | memoryview) -> int:
        """As `store`, of content that is in one piece, which must not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSource:
    """One layer, opened by the caller.

    Attributes:
        digest: `sha256:<hex>` of the blob.
        size: Length of the blob in bytes.
        diff_id: `sha256:<hex>` of the tar; None if the image does not say.
        blob: Open for reading at its beginning.
    """

    digest: str
    size: int
    diff_id: str | None
    blob: BinaryIO


class LayerMerger:
    """Merges layer after layer into `tree`.

    Attributes:
        tree: The result so far.
        entries: Tar members read.
        unpacked_bytes: Decompressed bytes read.
    """

    def __init__(self, sink: DataSink, limits: Limits, cancel: Cancel | None = None) -> None:
        self.tree = Tree()
        self.entries = 0
        self.unpacked_bytes = 0
        self._metadata_bytes = 0
        self._sink = sink
        self._limits = limits
        self._cancel = cancel or Cancel()

    def apply(self, layer: LayerSource) -> None:
        """Read one layer to its end.

        Raises:
            Corrupt: the blob is damaged or not what its digests say.
            InvalidInput: an entry breaks a rule; the message names layer and entry.
            Exhausted: a limit is passed.
            Cancelled: the caller cancelled.
        """
        self.tree.begin_layer()
        limit = self._limits.unpacked_bytes - self.unpacked_bytes
        with LayerReader(
            layer.blob, digest=layer.digest, size=layer.size, diff_id=layer.diff_id, limit=limit
        ) as reader:
            stream = ByteStream(reader)
            name = b""
            waiting: list[tuple[bytes, bytes]] = []
            try:
                for entry in tarstream.read_tar(stream):
                    name = entry.name
                    self._count(entry)
                    if not self._apply_entry(entry, stream):
                        waiting.append((entry.name, entry.link))
                    name = b""
                self._link_late(waiting)
                stream.drain()
            except (InvalidInput, Corrupt) as error:
                raise _placed(error, layer.digest, name) from error
            self.unpacked_bytes += reader.unpacked_bytes

    def _count(self, entry: TarEntry) -> None:
        self.entries += 1
        if self.entries > self._limits.entries:
            raise Exhausted(
                f"the image has more than {self._limits.entries} entries; raise the limit if you trust it",
                reason="IMAGE_TOO_LARGE",
            )
        self._metadata_bytes += len(entry.name) + len(entry.link)
        if entry.xattrs:
            self._metadata_bytes += sum(len(name) + len(value) for name, value in entry.xattrs.items())
        if self._metadata_bytes > self._limits.metadata_bytes:
            raise Exhausted(
                f"the image's names and extended attributes have more than {self._limits.metadata_bytes} "
                "bytes; raise the limit if you trust it",
                reason="IMAGE_TOO_LARGE",
            )
        if self.entries % 256 == 0:
            self._cancel.check()

    def _apply_entry(self, entry: TarEntry, stream: ByteStream) -> bool:
        """Apply one entry; False for a hard link whose target is not there yet."""
        if self.tree.apply_marker(entry.name):
            return True
        if entry.kind == tarstream.HARDLINK:
            return self.tree.link(entry.name, entry.link)
        kind = _KINDS[entry.kind]
        node = Node(kind, entry.mode, entry.uid, entry.gid, entry.mtime_ns)
        node.xattrs = entry.xattrs or None
        if kind is Kind.FILE:
            self._store(node, entry, stream)
        elif kind is Kind.SYMLINK:
            if not 0 < len(entry.link) <= MAX_LINK_TARGET:
                raise InvalidInput(f"a symbolic link with a target of {len(entry.link)} bytes")
            node.target, node.mode = entry.link, 0o777
        elif kind in (Kind.CHARDEV, Kind.BLOCKDEV):
            if not 0 <= entry.major < 1 << 12 or not 0 <= entry.minor < 1 << 20:
                raise InvalidInput(f"a device {entry.major}:{entry.minor}, which Linux cannot have")
            node.major, node.minor = entry.major, entry.minor
        self.tree.add(entry.name, node)
        return True

    def _store(self, node: Node, entry: TarEntry, stream: ByteStream) -> None:
        if entry.size > MAX_FILE_BYTES:
            raise InvalidInput(f"a file of {entry.size} bytes; ext4 allows {MAX_FILE_BYTES}")
        node.size = entry.size
        if entry.sparse is None:
            if entry.size:
                data = stream.piece(entry.size)
                if data is not None:
                    first = self._sink.store_piece(data)
                else:
                    first = self._sink.store(self._checked(stream.chunks(entry.size)), entry.size)
                node.extents = (Extent(0, first, -(-entry.size // BLOCK_SIZE)),)
            return
        node.extents = tuple(self._store_sparse(entry.sparse, stream))

    def _store_sparse(self, fragments: list[tuple[int, int]], stream: ByteStream) -> Iterator[Extent]:
        """One extent for each run of blocks that fragments touch; the gaps inside are zeros."""
        run: list[tuple[int, int]] = []
        for fragment in fragments:
            if run and fragment[0] // BLOCK_SIZE > (run[-1][0] + run[-1][1] - 1) // BLOCK_SIZE + 1:
                yield self._store_run(run, stream)
                run = []
            run.append(fragment)
        if run:
            yield self._store_run(run, stream)

    def _store_run(self, run: list[tuple[int, int]], stream: ByteStream) -> Extent:
        logical = run[0][0] // BLOCK_SIZE
        start = logical * BLOCK_SIZE
        length = run[-1][0] + run[-1][1] - start

        def chunks() -> Iterator[bytes | memoryview]:
            at = start
            for offset, size in run:
                if offset > at:
                    yield bytes(offset - at)  # less than two blocks
                yield from stream.chunks(size)
                at = offset + size

        return Extent(logical, self._sink.store(self._checked(chunks()), length), -(-length // BLOCK_SIZE))

    def _checked(self, chunks: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            self._cancel.check()
            yield chunk

    def _link_late(self, waiting: list[tuple[bytes, bytes]]) -> None:
        """Hard links to what came later in the same layer, also through each other.

        From both ends in turn, and not forever: a hostile chain would cost its length squared.
        """
        for _ in range(_LATE_LINK_PASSES):
            if not waiting:
                return
            missing = [(name, target) for name, target in waiting if not self.tree.link(name, target)]
            if len(missing) == len(waiting):
                break
            waiting = missing[::-1]
        if waiting:
            name, target = waiting[0]
            raise InvalidInput(
                f"the hard link {_shown(name)} points to {_shown(target)}, which does not exist",
                reason="BAD_HARDLINK",
            )


def _shown(name: bytes) -> str:
    text = name.decode(errors="backslashreplace")
    return repr(text if len(text) <= 200 else text[:200] + "…")


def _placed(error: VoidboxError, digest: str, name: bytes) -> VoidboxError:
    """`error` with layer and entry in message and metadata, unless it names the layer already."""
    if error.metadata.get("digest"):
        return error
    where = f", entry {_shown(name)}" if name else ""
    metadata = {**error.metadata, "digest": digest}
    if name:
        metadata["entry"] = name.decode(errors="backslashreplace")[:1000]
    return type(error)(f"layer {digest}{where}: {error.message}", reason=error.reason, **metadata)
