"""Content by its sha256 digest, on the local disk.

A blob appears under its name only when it is whole and on disk (fsync, then rename), so
what is there is what its name says.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path
from typing import IO

from services.common.errors import Exhausted, NotFound
from services.common.paths import private_dir
from services.orchestrator.records import Digest

CHUNK = 64 * 1024
# A blob that nothing refers to may belong to a run that is about to be created.
_GRACE_SECONDS = 3600.0


class BlobWriter:
    """A blob that is being written; `commit` gives it its name."""

    def __init__(self, blobs: Blobs, limit: int) -> None:
        self._blobs = blobs
        self._limit = limit
        self._path = blobs.directory / f"tmp-{secrets.token_hex(8)}"
        self._file: IO[bytes] = open(self._path, "xb")  # noqa: SIM115 - closed by `close`
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        """Add `data`.

        Raises:
            Exhausted: the blob would be longer than its limit, or the disk is full.
        """
        self.size += len(data)
        if self.size > self._limit:
            raise Exhausted(
                f"more than the limit of {self._limit} bytes", reason="TOO_LARGE", limit=self._limit
            )
        self._hash.update(data)
        with disk_errors(self._path):
            self._file.write(data)

    def commit(self) -> Digest:
        """Make what was written a blob, and return its digest."""
        with disk_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        digest = Digest(value=f"sha256:{self._hash.hexdigest()}", size=self.size)
        target = self._blobs.path(digest.value)
        private_dir(target.parent)
        os.replace(self._path, target)
        os.utime(target)
        return digest

    def close(self) -> None:
        """Drop what was not committed. Idempotent."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class Blobs:
    """The blobs in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = private_dir(directory)
        for leftover in self.directory.glob("tmp-*"):
            leftover.unlink(missing_ok=True)

    def path(self, digest: str) -> Path:
        """Where the blob is, if it is there."""
        name = digest.removeprefix("sha256:")
        assert len(name) == 64
        assert not set(name) - set("0123456789abcdef")
        return self.directory / name[:2] / name

    def find(self, digest: str) -> Path:
        """Where the blob is.

        Raises:
            NotFound: there is no such blob.
        """
        path = self.path(digest)
        if not path.exists():
            raise NotFound(f"content {digest} is not stored; upload it", reason="NO_CONTENT", digest=digest)
        return path

    @contextlib.contextmanager
    def writer(self, limit: int) -> Iterator[BlobWriter]:
        """A new blob of at most `limit` bytes; dropped unless committed."""
        writer = BlobWriter(self, limit)
        try:
            yield writer
        finally:
            writer.close()

    def put(self, data: bytes) -> Digest:
        """Store `data`."""
        with self.writer(len(data)) as writer:
            writer.write(data)
            return writer.commit()

    def put_file(self, path: Path, limit: int) -> Digest:
        """Store a copy of the first `limit` bytes of the file `path`."""
        with self.writer(limit) as writer, open(path, "rb") as file:
            while data := file.read(min(CHUNK, limit - writer.size)):
                writer.write(data)
            return writer.commit()

    def sweep(self, used: Collection[str]) -> None:
        """Remove blobs that nothing in `used` names and that are not fresh."""
        oldest = time.time() - _GRACE_SECONDS
        for path in self.directory.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                if f"sha256:{path.name}" not in used and path.stat().st_mtime < oldest:
                    path.unlink()

    def remove(self, digests: Collection[str]) -> None:
        """Remove blobs that nothing uses any more."""
        for digest in digests:
            self.path(digest).unlink(missing_ok=True)


def _open(path: Path, start: int) -> IO[bytes]:
    # In a thread, the file would be left open if the caller were cancelled just then.
    file = open(path, "rb")  # noqa: SIM115 - closed by `reading`
    file.seek(start)
    return file


@contextlib.asynccontextmanager
async def reading(path: Path, start: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
    """The file `path` from offset `start` on, in chunks of at most `CHUNK` bytes, off the event loop."""
    file = _open(path, start)

    async def chunks() -> AsyncIterator[bytes]:
        while data := await asyncio.to_thread(file.read, CHUNK):
            yield data

    try:
        yield chunks()
    finally:
        file.close()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into `Exhausted`."""
    try:
        yield
    except OSError as error:
        message = f"{path.parent}: {error.strerror}; make room or set VOIDBOX_STATE_DIR"
        raise Exhausted(message, reason="DISK_FULL", path=path.parent) from error
