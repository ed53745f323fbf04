"""Turns a layer blob into its tar bytes, verified, in a thread of its own.

The blob's size and sha256 and the tar's sha256 (the diff id) are computed on the way, so a blob
is read once; a mismatch is raised at the end of the stream, before anything made from it may be
used. ISA-L, zstd and sha256 release the interpreter's lock, so this runs beside the parser. ISA-L
inflates in less than half of zlib's time: 0.35 s instead of 0.95 s for the 240 MB of a base system.
"""

from __future__ import annotations

import hashlib
import io
import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import IO, BinaryIO, Final, Self, cast

import zstandard
from isal import igzip_lib

from services.common.errors import Corrupt, Exhausted, VoidboxError

_CHUNK: Final = 1 << 20
_INPUT: Final = 1 << 18
_DEPTH: Final = 4  # chunks ahead of the parser: 4 MiB
_ZSTD_WINDOW: Final = 1 << 27  # `zstd --long` without a special flag for the reader
_END: Final = None


class _HashingReader(io.RawIOBase):
    """Counts and hashes what passes; never reads past `size` + 1 bytes."""

    def __init__(self, source: BinaryIO, size: int) -> None:
        self._source = source
        self._left = size + 1
        self.sha256 = hashlib.sha256()
        self.count = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(min(size if size >= 0 else _CHUNK, self._left))
        self._left -= len(data)
        self.count += len(data)
        self.sha256.update(data)
        return data


class LayerReader:
    """Iterates over the decompressed bytes of one blob; a context manager that ends its thread.

    Args:
        blob: The compressed (gzip, zstd) or plain tar; told apart by its first bytes, since
            media types lie.
        digest: `sha256:<hex>` of the blob.
        size: Length of the blob.
        diff_id: `sha256:<hex>` of the tar, or None if it is not known.
        limit: How many bytes may come out.
    """

    def __init__(self, blob: BinaryIO, *, digest: str, size: int, diff_id: str | None, limit: int) -> None:
        self._raw = _HashingReader(blob, size)
        self._digest, self._size, self._diff_id, self._limit = digest, size, diff_id, limit
        self._queue: queue.Queue[bytes | VoidboxError | None] = queue.Queue(_DEPTH)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="layer-reader", daemon=True)
        self._finished = False
        self.unpacked_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        while self._thread.is_alive():  # the thread may be blocked on a full queue
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                self._thread.join(0.05)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """The next chunk.

        Raises:
            Corrupt: the blob cannot be decompressed or is not what its digest says.
            Exhausted: more comes out than the limit allows.
        """
        if self._finished:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, bytes):
            return item
        self._finished = True
        if item is None:
            raise StopIteration
        raise item

    def _run(self) -> None:
        outcome: VoidboxError | None = _END
        try:
            self._pump()
        except VoidboxError as error:
            outcome = error
        except (igzip_lib.IsalError, zstandard.ZstdError, EOFError) as error:  # type: ignore[misc]
            outcome = self._corrupt(f"cannot be decompressed: {error}")
        except OSError as error:
            outcome = Corrupt(f"layer {self._digest} cannot be read: {error}", digest=self._digest)
        except BaseException as error:
            outcome = Corrupt(f"layer {self._digest}: {type(error).__name__}: {error}", digest=self._digest)
            raise
        finally:
            self._queue.put(outcome)

    def _corrupt(self, what: str) -> Corrupt:
        """`what`, or the wrong digest if that is the deeper cause."""
        mismatch = self._mismatch()
        return mismatch or Corrupt(f"layer {self._digest} {what}", digest=self._digest)

    def _mismatch(self) -> Corrupt | None:
        while self._raw.read(_CHUNK):
            pass
        found = f"sha256:{self._raw.sha256.hexdigest()}"
        if self._raw.count != self._size:
            more = "at least " if self._raw.count > self._size else ""
            return Corrupt(
                f"layer {self._digest} has {more}{self._raw.count} bytes, its descriptor says {self._size}",
                reason="WRONG_SIZE",
                digest=self._digest,
            )
        if found != self._digest:
            return Corrupt(
                f"layer {self._digest} has the digest {found}", reason="WRONG_DIGEST", digest=self._digest
            )
        return None

    def _pump(self) -> None:
        diff = hashlib.sha256()
        for data in _decompressed(self._raw):
            if self._stopped.is_set():
                return
            self.unpacked_bytes += len(data)
            if self.unpacked_bytes > self._limit:
                raise Exhausted(
                    f"layer {self._digest} unpacks to more than the {self._limit} bytes left of the limit; "
                    "raise the limit if you trust the image",
                    reason="IMAGE_TOO_LARGE",
                    digest=self._digest,
                )
            diff.update(data)
            self._queue.put(data)
        if mismatch := self._mismatch():
            raise mismatch
        found = f"sha256:{diff.hexdigest()}"
        if self._diff_id is not None and found != self._diff_id:
            raise Corrupt(
                f"layer {self._digest} unpacks to {found}, the image's config says {self._diff_id}",
                reason="WRONG_DIFF_ID",
                digest=self._digest,
            )


def _decompressed(raw: _HashingReader) -> Iterator[bytes]:
    head = raw.read(_INPUT)
    if head[:2] == b"\x1f\x8b":
        yield from _gunzip(head, raw)
    elif head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[:1] and head[0] >> 4 == 5):
        yield from _unzstd(head, raw)
    else:
        while head:
            yield head
            head = raw.read(_CHUNK)


def _gunzip(data: bytes, raw: _HashingReader) -> Iterator[bytes]:
    """All members of a gzip file; zero padding may follow the last."""
    while True:
        member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        while True:
            out = member.decompress(data, _CHUNK)
            if out:
                yield out
            if member.eof:
                break
            data = b""
            if member.needs_input:
                data = raw.read(_INPUT)
                if not data:
                    raise EOFError("the gzip stream ends too early")
        data = member.unused_data.lstrip(b"\0")
        while not data:
            data = raw.read(_INPUT)
            if not data:
                return
            data = data.lstrip(b"\0")


class _Rejoined(io.RawIOBase):
    def __init__(self, head: bytes, raw: _HashingReader) -> None:
        self._head, self._raw = head, raw

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._head:
            cut = len(self._head) if size < 0 else size
            piece, self._head = self._head[:cut], self._head[cut:]
            return piece
        return self._raw.read(size)


def _unzstd(head: bytes, raw: _HashingReader) -> Iterator[bytes]:
    """All frames. A frame that ends too early shows by the digests: zstandard says nothing."""
    context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    with context.stream_reader(
        cast("IO[bytes]", _Rejoined(head, raw)), read_across_frames=True, closefd=False
    ) as reader:
        while data := reader.read(_CHUNK):
            yield data
