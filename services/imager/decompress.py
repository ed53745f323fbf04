"""Turns a layer blob into its tar bytes, verified, in two threads beside the parser's.

The tar's sha256 is computed on the way and compared with the diff id at the end of the stream,
before anything made from it may be used. That proves the blob too, which was checked when it was
pulled: its own sum is computed only where no diff id is known, and to name the cause of an error.

ISA-L, zstd and sha256 release the interpreter's lock, so all three threads run at once. ISA-L
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

_CHUNK: Final = 1 << 20  # larger ones leave the processor's cache before they are hashed
_INPUT: Final = 1 << 18
_DEPTH: Final = 4  # chunks ahead of the parser: 4 MiB
_ZSTD_WINDOW: Final = 1 << 27  # `zstd --long` without a special flag for the reader
_END: Final = None


class _Hasher:
    """Two sha256 sums, of the blob and of the tar, computed in a thread of their own."""

    def __init__(self) -> None:
        self.blob = hashlib.sha256()
        self.tar = hashlib.sha256()
        self._queue: queue.Queue[tuple[hashlib._Hash, bytes] | None] = queue.Queue(_DEPTH)
        self._thread = threading.Thread(target=self._run, name="layer-hasher", daemon=True)
        self._thread.start()

    def add(self, target: hashlib._Hash, data: bytes) -> None:
        """Go on with `self.blob` or `self.tar`."""
        self._queue.put((target, data))

    def finish(self) -> None:
        """Wait until all is in the sums; nothing may be added any more. Twice does no harm."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            item[0].update(item[1])


class _HashingReader(io.RawIOBase):
    """Counts what passes, and hashes it if there is a hasher; never reads past `size` + 1 bytes."""

    def __init__(self, source: BinaryIO, size: int, hasher: _Hasher | None) -> None:
        self._source = source
        self._left = size + 1
        self._hasher = hasher
        self.count = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(min(size if size >= 0 else _CHUNK, self._left))
        self._left -= len(data)
        self.count += len(data)
        if self._hasher is not None:
            self._hasher.add(self._hasher.blob, data)
        return data


class LayerReader:
    """Iterates over the decompressed bytes of one blob; a context manager that ends its threads.

    Args:
        blob: The compressed (gzip, zstd) or plain tar; told apart by its first bytes, since
            media types lie.
        digest: `sha256:<hex>` of the blob.
        size: Length of the blob.
        diff_id: `sha256:<hex>` of the tar, or None if it is not known.
        limit: How many bytes may come out.
    """

    def __init__(self, blob: BinaryIO, *, digest: str, size: int, diff_id: str | None, limit: int) -> None:
        self._blob = blob
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
        outcome: VoidboxError | None = Corrupt(f"layer {self._digest} was not read", digest=self._digest)
        hasher = _Hasher()
        try:
            outcome = self._outcome(hasher)
        except VoidboxError as error:
            outcome = error
        except OSError as error:
            outcome = Corrupt(f"layer {self._digest} cannot be read: {error}", digest=self._digest)
        except BaseException as error:
            outcome = Corrupt(f"layer {self._digest}: {type(error).__name__}: {error}", digest=self._digest)
            raise
        finally:
            hasher.finish()
            self._queue.put(outcome)

    def _outcome(self, hasher: _Hasher) -> VoidboxError | None:
        """Read it all; what is wrong with it, or `_END`."""
        raw = _HashingReader(self._blob, self._size, hasher if self._diff_id is None else None)
        try:
            self._pump(raw, hasher)
        except (igzip_lib.IsalError, zstandard.ZstdError, EOFError) as error:  # type: ignore[misc]
            return self._mismatch(raw, hasher) or Corrupt(
                f"layer {self._digest} cannot be decompressed: {error}", digest=self._digest
            )
        return _END

    def _mismatch(self, raw: _HashingReader, hasher: _Hasher) -> Corrupt | None:
        """What is wrong with the blob itself, read to its end: a deeper cause than any other."""
        while raw.read(_CHUNK):
            pass
        hasher.finish()
        if raw.count != self._size:
            more = "at least " if raw.count > self._size else ""
            return Corrupt(
                f"layer {self._digest} has {more}{raw.count} bytes, its descriptor says {self._size}",
                reason="WRONG_SIZE",
                digest=self._digest,
            )
        found = f"sha256:{(hasher.blob if self._diff_id is None else self._hashed_again()).hexdigest()}"
        if found != self._digest:
            return Corrupt(
                f"layer {self._digest} has the digest {found}", reason="WRONG_DIGEST", digest=self._digest
            )
        return None

    def _hashed_again(self) -> hashlib._Hash:
        """The sum of the whole blob, from its beginning: its bytes were only counted on the way."""
        digest = hashlib.sha256()
        self._blob.seek(0)
        while data := self._blob.read(_CHUNK):
            digest.update(data)
        return digest

    def _pump(self, raw: _HashingReader, hasher: _Hasher) -> None:
        for data in _decompressed(raw):
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
            hasher.add(hasher.tar, data)
            self._queue.put(data)
        hasher.finish()
        found = f"sha256:{hasher.tar.hexdigest()}"
        proven = found == self._diff_id and not raw.read(_CHUNK) and raw.count == self._size
        if not proven and (mismatch := self._mismatch(raw, hasher)):
            raise mismatch
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
