"""Reads what is cached and compares it with its names: layers, disks, guest images, disks of agents.

The disk of an image has no digest of its own: it is named by the layers it was made of. Since the
writer gives the same bytes for the same layers, it is written once more and compared.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from services.common.errors import VoidboxError
from services.imager.cache import COLLECT_LOCK, ImageCache, in_use
from services.imager.disk import disk_key, write_disk
from services.imager.guest_store import guest_directories, load_guest_image, verify_guest_image
from services.imager.images import CachedImage, Catalog
from services.imager.limits import MIB, Cancel, Limits
from services.imager.progress import silent

log = logging.getLogger(__name__)

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One piece that is not what its name says.

    Attributes:
        kind: "blob", "disk", "guest image" or "agent disk".
        removed: Whether it is gone now.
    """

    kind: str
    digest: str
    path: Path
    removed: bool = False


class Verifier:
    """Checks one cache. Everything here blocks; use a thread."""

    def __init__(self, catalog: Catalog, cache: Path, limits: Limits) -> None:
        self._catalog = catalog
        self._images = catalog.cache
        self._cache = cache
        self._limits = limits

    def verify(
        self, reference: str = "", *, repair: bool = False, cancel: Cancel | None = None
    ) -> tuple[int, list[Damage]]:
        """Read all content of the image `reference`, or everything there is.

        Args:
            reference: Reference or digest; "" for everything.
            repair: Remove what is damaged, unless a running box has it open.

        Returns:
            How many pieces were read, and those that are damaged.

        Raises:
            NotFound: the image is not in the cache.
            Cancelled: the caller cancelled.
        """
        cancel = cancel or Cancel()
        checked, found = 0, []
        with self._images.lock(COLLECT_LOCK, cancel, shared=True):
            for damage in self._everything(reference, cancel):
                checked += 1
                if damage is not None:
                    log.warning("%s %s is damaged: %s", damage.kind, damage.digest, damage.path)
                    found.append(_removed(damage) if repair else damage)
        return checked, found

    def _everything(self, reference: str, cancel: Cancel) -> Iterator[Damage | None]:
        """One item for each piece: None if it is sound."""
        images = self._catalog.matching(reference) if reference else self._catalog.list_images()
        bad: set[str] = set()
        for digest in self._digests(None if not reference else images):
            damage = _checked_blob(self._images, digest, cancel)
            if damage is not None:
                bad.add(digest)
            yield damage
        for image in _one_per_chain(images):
            if not bad & {layer.digest for layer in image.layers}:
                yield from self._disks(image, cancel)
        if not reference:
            yield from self._guest_images()
            yield from self._hashed(cancel)

    def _digests(self, images: list[CachedImage] | None) -> list[str]:
        if images is None:
            return [f"sha256:{path.name}" for path in sorted((self._images.root / "blobs/sha256").iterdir())]
        digests: set[str] = set()
        for image in images:
            digests |= {image.digest, image.manifest.config.digest, *(layer.digest for layer in image.layers)}
        return sorted(digests)

    def _disks(self, image: CachedImage, cancel: Cancel) -> Iterator[Damage | None]:
        for key in self._images.record_keys("disks"):
            record = self._images.read_record("disks", key) or {}
            free_mib = record.get("free_mib")
            path = self._images.root / "disks" / f"{key}.ext4"
            if not isinstance(free_mib, int) or not path.exists():
                continue
            kinds = {
                disk_key(image.config.diff_ids, free_mib, read_only=read_only): read_only
                for read_only in (False, True)
            }
            if key not in kinds:
                continue  # of other layers, or by an older writer: nobody will use it
            with self._images.scratch() as fresh:
                write_disk(
                    fresh, self._images, image.layers, key, free_bytes=free_mib * MIB, read_only=kinds[key],
                    limits=self._limits, cancel=cancel, report=silent,
                )  # fmt: skip
                same = _same(path, fresh, cancel)
            yield None if same else Damage(kind="disk", digest=f"sha256:{key}", path=path)

    def _guest_images(self) -> Iterator[Damage | None]:
        for directory in guest_directories(self._cache):
            try:
                verify_guest_image(load_guest_image(self._cache, directory.name))
            except VoidboxError:
                yield Damage(kind="guest image", digest=f"sha256:{directory.name}", path=directory)
            else:
                yield None

    def _hashed(self, cancel: Cancel) -> Iterator[Damage | None]:
        """Disks of agents and directories, whose records hold a digest."""
        for directory, kind in (("agents", "agent disk"), ("disks", "disk")):
            for key in self._images.record_keys(directory):
                record = self._images.read_record(directory, key) or {}
                path = self._images.root / directory / f"{key}.ext4"
                if "digest" in record and path.exists():
                    sound = _file_digest(path, cancel) == record["digest"]
                    yield None if sound else Damage(kind=kind, digest=f"sha256:{key}", path=path)


def _one_per_chain(images: list[CachedImage]) -> list[CachedImage]:
    return list({image.config.diff_ids: image for image in images}.values())


def _checked_blob(cache: ImageCache, digest: str, cancel: Cancel) -> Damage | None:
    path = cache.blob_path(digest)
    return None if _file_digest(path, cancel) == digest else Damage(kind="blob", digest=digest, path=path)


def _removed(damage: Damage) -> Damage:
    path = damage.path
    if path.is_dir():
        away = Path(tempfile.mkdtemp(prefix="build-", dir=path.parent))  # the builder sweeps these
        path.rename(away / path.name)
        shutil.rmtree(away, ignore_errors=True)
    elif in_use(path):
        return damage
    else:
        path.unlink(missing_ok=True)
        if damage.kind != "blob":
            path.with_suffix(".json").unlink(missing_ok=True)
    return replace(damage, removed=True)


def _same(path: Path, fresh: BinaryIO, cancel: Cancel) -> bool:
    fresh.flush()
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != os.fstat(fresh.fileno()).st_size:
            return False
        fresh.seek(0)
        while data := file.read(_CHUNK):
            cancel.check()
            if data != fresh.read(len(data)):
                return False
    return True


def _file_digest(path: Path, cancel: Cancel) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while data := file.read(_CHUNK):
                cancel.check()
                digest.update(data)
    except FileNotFoundError:
        return ""
    return f"sha256:{digest.hexdigest()}"
