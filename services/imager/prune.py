"""Removes cached content that is no longer wanted; never the disk of a running box or of a snapshot."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from services.common.errors import InvalidInput, WrongState
from services.imager.cache import COLLECT_LOCK, in_use
from services.imager.ext4 import WRITER_VERSION
from services.imager.images import CachedImage, Catalog
from services.imager.limits import Cancel
from services.imager.partial import drop_partial
from services.imager.reference import is_digest
from services.imager.stored import remove_stored, stored_disks


class Housekeeper:
    """Works on one catalog. Everything here blocks, and waits for pulls and builds under way.

    Args:
        home: The cache directory, which holds `guest/`.
    """

    def __init__(self, catalog: Catalog, home: Path | None = None) -> None:
        self._catalog = catalog
        self._home = home or catalog.cache.root
        self._cache = catalog.cache

    def delete(self, reference: str, cancel: Cancel | None = None) -> int:
        """Remove all platforms of a reference, or what a digest names; return the bytes freed.

        A digest names images, or a guest image, or the disk of an agent or directory.

        Raises:
            NotFound: it is not in the cache.
            WrongState: a running box or a snapshot uses its disk, or it is the default guest image.
        """
        cancel = cancel or Cancel()
        with self._cache.lock(COLLECT_LOCK, cancel):
            if is_digest(reference.strip()):
                freed = remove_stored(self._cache, self._home, reference.strip(), cancel)
                if freed is not None:
                    return freed
            doomed = self._catalog.matching(reference)
            kept = [image for image in self._catalog.list_images() if image not in doomed]
            disks = self._disks_only_of(doomed, kept)
            busy = next((path for path in disks if in_use(path)), None)
            if busy is not None:
                raise WrongState(
                    f"{reference} is the disk of a running box or of a snapshot; stop or remove it first: "
                    "voidbox ps, voidbox snapshot ls",
                    reason="IMAGE_IN_USE",
                    path=busy,
                )
            for image in doomed:
                self._catalog.forget(image)
            return self._collect(kept)

    def prune(
        self,
        *,
        max_size_bytes: int = 0,
        older_than_seconds: float | None = None,
        cancel: Cancel | None = None,
    ) -> tuple[list[str], int]:
        """Remove images that nobody used for long, or the least recently used until the rest is small enough.

        Without a limit nothing but unreferenced content goes. Images of running boxes and snapshots stay.

        Returns:
            The references removed and the bytes freed.
        """
        if max_size_bytes < 0 or (older_than_seconds is not None and older_than_seconds < 0):
            raise InvalidInput("a limit is negative", reason="BAD_LIMIT")
        cancel = cancel or Cancel()
        removed: list[str] = []
        with self._cache.lock(COLLECT_LOCK, cancel):
            kept = sorted(self._catalog.list_images(), key=lambda image: image.use_time)
            freed = self._collect(kept) + drop_partial(self._cache, 0)
            now = time.time()
            for image in list(kept):
                old = older_than_seconds is not None and now - image.use_time > older_than_seconds
                if not old and not (max_size_bytes and self._total() > max_size_bytes):
                    continue
                rest = [other for other in kept if other is not image]
                if any(in_use(path) for path in self._disks_only_of([image], rest)):
                    continue
                self._catalog.forget(image)
                removed.append(image.reference)
                kept = rest
                freed += self._collect(kept)
            for item in stored_disks(self._cache):
                old = older_than_seconds is not None and now - item.use_time > older_than_seconds
                if (old or (max_size_bytes and self._total() > max_size_bytes)) and not in_use(item.path):
                    removed.append(f"{item.kind} {item.name} {item.digest}")
                    freed += _remove(item.path) + _remove(item.path.with_suffix(".json"))
        return removed, freed

    def _disks_only_of(self, doomed: list[CachedImage], kept: list[CachedImage]) -> list[Path]:
        chains = {image.config.diff_ids for image in doomed} - {image.config.diff_ids for image in kept}
        found = []
        for key in self._cache.record_keys("disks"):
            record = self._cache.read_record("disks", key) or {}
            if tuple(record.get("diff_ids", ())) in chains:
                found.append(self._cache.root / "disks" / f"{key}.ext4")
        return found

    def _collect(self, kept: list[CachedImage]) -> int:
        """Remove blobs, disks and agents' disks that no kept image needs; return the bytes freed."""
        needed = {digest for image in kept for digest in _digests(image)}
        freed = 0
        for path in (self._cache.root / "blobs/sha256").iterdir():
            if f"sha256:{path.name}" not in needed:
                freed += _remove(path)
        for path in (self._cache.root / "locks").glob("*-*"):
            path.unlink(missing_ok=True)  # nobody holds it: each holder of one holds the collect lock too
        chains = {image.config.diff_ids for image in kept}
        for kind in ("disks", "agents"):
            for path in (self._cache.root / kind).glob("*.ext4"):
                record = self._cache.read_record(kind, path.stem) or {}
                old = record.get("writer") != WRITER_VERSION  # nobody will ask for it
                bound = kind == "disks" and "contents" not in record
                lost = bound and tuple(record.get("diff_ids", ())) not in chains
                if (old or lost) and not in_use(path):
                    freed += _remove(path) + _remove(path.with_suffix(".json"))
        return freed

    def _total(self) -> int:
        """Bytes that blobs and disks occupy."""
        total = 0
        for directory in ("blobs/sha256", "disks", "agents"):
            for path in (self._cache.root / directory).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_blocks * 512
        return total


def _digests(image: CachedImage) -> Iterator[str]:
    yield image.digest
    yield image.manifest.config.digest
    for layer in image.manifest.layers:
        yield layer.digest


def _remove(path: Path) -> int:
    try:
        size = path.stat().st_blocks * 512
        path.unlink()
    except FileNotFoundError:
        return 0
    return size
