"""A blob while it arrives: hashed and measured as it is written, kept if the pull is cut off.

What a killed or cancelled pull had is taken up by the next one, which reads it once to hash it:
so the digest at the end covers all bytes, whoever brought them. Nothing here has a name that
is trusted before that.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from services.common.errors import Cancelled, Corrupt, Unavailable
from services.imager.arrival import Arrival
from services.imager.cache import ImageCache, disk_errors, hex_part
from services.imager.limits import Cancel
from services.imager.manifest import Descriptor
from services.imager.progress import Progress, Report
from services.imager.writeback import WRITEBACK_BYTES, start_writeback

_CHUNK: Final = 1 << 20
_KEPT_SECONDS: Final = 7 * 86400  # a pull that nobody takes up for so long has been given up


def blob_lock(digest: str) -> str:
    """Name of the cache's lock under which one blob is brought."""
    return f"blob-{hex_part(digest)}"


class PartialBlob:
    """The `BlobSink` of one blob of the cache; a context manager, whose user holds `blob_lock`.

    Left by an exception it keeps its bytes if more of them may come (the network failed, the caller
    cancelled, the process ends) and drops them if they are wrong or the disk is full.

    Args:
        where: Names the image in errors.
        arrival: Told what has come, for who reads it already.

    Attributes:
        count: Bytes that are here.
        resumed: Whether some were here before.
    """

    def __init__(
        self,
        cache: ImageCache,
        descriptor: Descriptor,
        where: str,
        cancel: Cancel,
        report: Report,
        arrival: Arrival | None = None,
    ) -> None:
        self._cache, self._descriptor, self._where = cache, descriptor, where
        self._cancel, self._report, self._arrival = cancel, report, arrival
        self._path = directory(cache) / hex_part(descriptor.digest)
        self._handle = -1
        self._digest = hashlib.sha256()
        self.count = 0
        self.resumed = False

    def __enter__(self) -> Self:
        self._path.parent.mkdir(exist_ok=True)
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            self._take_up()
        except BaseException:
            os.close(self._handle)
            raise
        return self

    def _take_up(self) -> None:
        if os.fstat(self._handle).st_size > self._descriptor.size:
            self.reset()
        while data := os.read(self._handle, _CHUNK):
            self._cancel.check()
            self._digest.update(data)
            self.count += len(data)
        self.resumed = self.count > 0
        if self._arrival is not None:
            self._arrival.begin(self._handle, self.count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._arrival is not None:
            self._arrival.lose()  # unless it is whole
        os.close(self._handle)
        lasting = isinstance(error, Unavailable | Cancelled) or not isinstance(error, Exception)
        if error is not None and not (lasting and self.count):
            self._path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Append `data`.

        Raises:
            Corrupt: the blob is longer than its descriptor says.
            Exhausted: the disk is full.
        """
        if self.count + len(data) > self._descriptor.size:
            raise self._wrong(f"has more than {self._descriptor.size} bytes", "WRONG_SIZE")
        with disk_errors(self._path):
            view = memoryview(data)
            while view:
                view = view[os.write(self._handle, view) :]
        self._digest.update(data)
        if (self.count + len(data)) // WRITEBACK_BYTES > self.count // WRITEBACK_BYTES:
            start_writeback(self._handle)
        self.count += len(data)
        if self._arrival is not None:
            self._arrival.grow(self.count)
        self._report(downloaded(self._descriptor, self.count))

    def reset(self) -> None:
        """Forget all bytes; the source begins again."""
        if self._arrival is not None and self.count:
            self._arrival.lose()
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        self._digest = hashlib.sha256()
        self.count, self.resumed = 0, False

    def matches(self) -> bool:
        """Whether what is here is the whole blob."""
        return self.count == self._descriptor.size and self._found() == self._descriptor.digest

    def finish(self) -> None:
        """Make it the blob, after which it has its final name.

        Raises:
            Corrupt: it is not what its descriptor says.
        """
        if self.count != self._descriptor.size:
            raise self._wrong(
                f"has {self.count} bytes, its descriptor says {self._descriptor.size}", "WRONG_SIZE"
            )
        if not self.matches():
            raise self._wrong(f"has the digest {self._found()}", "WRONG_DIGEST")
        with disk_errors(self._path):
            os.fsync(self._handle)
        os.fchmod(self._handle, 0o644)
        final = self._cache.blob_path(self._descriptor.digest)
        self._path.rename(final)
        for place in (final.parent, self._path.parent):
            _sync(place)
        if self._arrival is not None:
            self._arrival.finish()

    def _found(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"

    def _wrong(self, what: str, reason: str) -> Corrupt:
        return Corrupt(
            f"{self._where}: layer {self._descriptor.digest} {what}; its source is broken",
            reason=reason,
            digest=self._descriptor.digest,
        )


def downloaded(layer: Descriptor, count: int) -> Progress:
    """`count` bytes of `layer` are here."""
    return Progress(subject=layer.digest, action="download", done=count, total=layer.size, unit="bytes")


def directory(cache: ImageCache) -> Path:
    """Where partial blobs are; it may not exist yet."""
    return cache.root / "partial"


def drop_partial(cache: ImageCache, older_than_seconds: float = _KEPT_SECONDS) -> int:
    """Remove partial blobs that nobody has written for long and nobody brings now; return the bytes freed."""
    freed = 0
    place = directory(cache)
    for path in place.iterdir() if place.is_dir() else ():
        lock = os.open(
            cache.root / "locks" / f"blob-{path.name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            with contextlib.suppress(OSError):  # it is being brought, or has arrived in this moment
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                info = path.stat()
                if time.time() - info.st_mtime >= older_than_seconds:
                    path.unlink()
                    freed += info.st_blocks * 512
        finally:
            os.close(lock)
    return freed


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
