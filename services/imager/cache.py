"""The image cache of one host: content by digest, safe for many processes and against crashes.

    blobs/sha256/<hex>   manifests, configs, layers, as their digests name them
    refs/<hex>.json      one reference on one platform: which manifest, since when
    disks/<hex>.ext4     one disk, with <hex>.json beside it
    agents/<hex>.ext4    the disk of an agent's program, likewise
    guests/<hex>.json    one reference to a guest image: which it was
    tmp/                 what is being written, each file locked by its writer
    locks/               flock(2) files

A final name appears only by fsync and rename, so what has one is whole. What a killed process
left in `tmp/` has no lock any more and is swept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from services.common.errors import Corrupt, Exhausted
from services.imager.limits import Cancel
from services.imager.lock import held
from services.imager.reference import is_digest

log = logging.getLogger(__name__)

COLLECT_LOCK: Final = "collect"  # shared while pulling or building, exclusive while removing
_FULL: Final = {
    28: "the disk is full",
    122: "the disk quota is used up",
    27: "the file is too large for the disk",
}
_BUFFER: Final = 1 << 20


class ImageCache:
    """Files below `root`, which is made if missing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("blobs/sha256", "refs", "disks", "agents", "guests", "tmp", "locks"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._sweep()

    def blob_path(self, digest: str) -> Path:
        """Where the blob is, or would be."""
        return self.root / "blobs/sha256" / hex_part(digest)

    def open_layer(self, digest: str) -> BinaryIO:
        """A layer's blob, open for reading without a buffer.

        Raises:
            Corrupt: it is not here (reason `BLOB_MISSING`).
        """
        try:
            return self.blob_path(digest).open("rb", buffering=0)
        except FileNotFoundError as error:
            raise Corrupt(
                f"layer {digest} is missing from the cache; pull the image again", reason="BLOB_MISSING"
            ) from error

    def has_blob(self, digest: str, size: int) -> bool:
        """Whether the blob is here with the length that its descriptor says."""
        try:
            return self.blob_path(digest).stat().st_size == size
        except FileNotFoundError:
            return False

    def put_blob(self, digest: str, data: bytes) -> None:
        """Store bytes whose digest the caller has checked."""
        if not self.has_blob(digest, len(data)):
            with self.writing(self.blob_path(digest)) as file:
                file.write(data)

    def read_blob(self, digest: str) -> bytes:
        """A small blob, verified; a damaged one is removed.

        Raises:
            FileNotFoundError: it is not here.
            Corrupt: it is damaged.
        """
        path = self.blob_path(digest)
        data = path.read_bytes()
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            path.unlink(missing_ok=True)
            raise Corrupt(
                f"the cached blob {digest} was damaged and has been removed; pull again", digest=digest
            )
        return data

    def read_record(self, kind: str, key: str) -> dict[str, Any] | None:
        """A JSON record of `refs`, `disks`, `agents` or `guests`; None if there is no sound one."""
        try:
            value = json.loads((self.root / kind / f"{key}.json").read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("cache record %s/%s cannot be read and is ignored: %s", kind, key, error)
            return None
        return value if isinstance(value, dict) else None

    def write_record(self, kind: str, key: str, value: dict[str, Any]) -> None:
        """Store a JSON record, replacing an older one."""
        with self.writing(self.root / kind / f"{key}.json") as file:
            file.write(json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")

    def record_keys(self, kind: str) -> list[str]:
        """The keys of all records of a kind, sorted."""
        return sorted(path.stem for path in (self.root / kind).glob("*.json"))

    @contextlib.contextmanager
    def writing(self, final: Path) -> Iterator[BinaryIO]:
        """A new file that becomes `final` when the block ends without an exception, and vanishes otherwise.

        Raises:
            Exhausted: the disk is full.
        """
        handle, name = self._temporary()
        temporary = Path(name)
        try:
            with disk_errors(final), os.fdopen(handle, "w+b", buffering=_BUFFER) as file:
                try:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                    os.fchmod(file.fileno(), 0o644)
                    temporary.rename(final)  # while the lock is held, so that no sweep comes between
                except BaseException:
                    _drop_buffer(file)
                    raise
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(final.parent)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[BinaryIO]:
        """A file without a name for reading and writing, gone when the block ends.

        Raises:
            Exhausted: the disk is full.
        """
        handle, name = self._temporary()
        Path(name).unlink()
        with disk_errors(self.root / "tmp"), os.fdopen(handle, "w+b", buffering=_BUFFER) as file:
            try:
                yield file
            except BaseException:
                _drop_buffer(file)
                raise

    @contextlib.contextmanager
    def scratch_directory(self) -> Iterator[Path]:
        """A private directory, gone with its contents when the block ends, or after a kill at the next start.

        Raises:
            Exhausted: the disk is full.
        """
        with disk_errors(self.root / "tmp"):
            with self._sweep_lock(fcntl.LOCK_SH):
                place = Path(tempfile.mkdtemp(dir=self.root / "tmp"))
                handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)
                os.close(handle)

    def _temporary(self) -> tuple[int, str]:
        with self._sweep_lock(fcntl.LOCK_SH):
            handle, name = tempfile.mkstemp(dir=self.root / "tmp")
            fcntl.flock(handle, fcntl.LOCK_EX)
        return handle, name

    @contextlib.contextmanager
    def _sweep_lock(self, how: int) -> Iterator[None]:
        handle = os.open(self.root / "locks/sweep", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, how)
            yield
        finally:
            os.close(handle)

    def _sweep(self) -> None:
        """Remove temporary files that nobody holds: their writers were killed."""
        with self._sweep_lock(fcntl.LOCK_EX):
            for path in (self.root / "tmp").iterdir():
                with contextlib.suppress(OSError):
                    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if path.is_dir():
                            shutil.rmtree(path, ignore_errors=True)
                        else:
                            path.unlink()
                    finally:
                        os.close(handle)

    @contextlib.contextmanager
    def lock(self, name: str, cancel: Cancel, *, shared: bool = False) -> Iterator[None]:
        """Hold the lock `name` among all processes; the kernel drops it with its holder.

        Raises:
            Cancelled: the caller cancelled while waiting.
        """
        with held(self.root / "locks" / name, cancel, shared=shared):
            yield


def hex_part(digest: str) -> str:
    """The hex digits of a digest, safe as a file name."""
    if not is_digest(digest):
        raise ValueError(f"{digest!r} is no sha256 digest")
    return digest.removeprefix("sha256:")


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk into a clear error.

    Raises:
        Exhausted: there is no room for `target`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise Exhausted(
            f"{_FULL[error.errno]}: no room for {target}; free some, remove images with "
            "`voidbox image prune`, or set VOIDBOX_CACHE_DIR to another disk",
            reason="DISK_FULL",
            path=target,
        ) from error


def in_use(path: Path) -> bool:
    """Whether somebody needs the disk.

    A QEMU that has it open locks bytes of its images (block/file-posix.c); a snapshot of a box, whose
    disks lie above it, holds it by a second name.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if os.fstat(handle).st_nlink > 1:
            return True
        query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, query)
        return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(handle)


def _drop_buffer(file: BinaryIO) -> None:
    """Forget what is not written yet: closing would try again to write it, on a full disk in vain."""
    with contextlib.suppress(OSError, ValueError):
        os.ftruncate(file.fileno(), 0)
    with contextlib.suppress(OSError):
        file.raw.close()  # type: ignore[attr-defined]


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
