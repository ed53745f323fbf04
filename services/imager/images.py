"""What is in the image cache: complete images, by reference and platform, and by digest."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass

from services.common.errors import NotFound, VoidboxError
from services.imager.cache import ImageCache
from services.imager.disk import LayerBlob
from services.imager.manifest import (
    ImageConfig,
    Manifest,
    Platform,
    host_default,
    parse_config,
    parse_manifest,
)
from services.imager.reference import is_digest, parse_reference

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedImage:
    """An image whose every piece is in the cache.

    Attributes:
        reference: Normalised.
        digest: Of the manifest.
        pull_time: Seconds since 1970; also `use_time`.
    """

    reference: str
    digest: str
    platform: Platform
    manifest: Manifest
    config: ImageConfig
    pull_time: float
    use_time: float

    @property
    def layers(self) -> tuple[LayerBlob, ...]:
        """The layers, lowest first."""
        return tuple(
            LayerBlob(digest=layer.digest, size=layer.size, diff_id=diff_id)
            for layer, diff_id in zip(self.manifest.layers, self.config.diff_ids, strict=True)
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of the layers as stored."""
        return sum({layer.digest: layer.size for layer in self.manifest.layers}.values())


class Catalog:
    """The images of one cache. Everything here blocks."""

    def __init__(self, cache: ImageCache) -> None:
        self.cache = cache

    def find(self, reference: str, platform: Platform) -> CachedImage | None:
        """The image of a normalised reference, which counts as used now; None if any piece is missing."""
        return self._load(ref_key(reference, platform), touch=True)

    def remember(self, reference: str, platform: Platform, digest: str, now: float) -> None:
        """Note that `reference` on `platform` is the manifest `digest`."""
        record = {
            "reference": reference,
            "os": platform.os,
            "architecture": platform.architecture,
            "variant": platform.variant,
            "manifest": digest,
            "pull_time": now,
        }
        self.cache.write_record("refs", ref_key(reference, platform), record)

    def forget(self, image: CachedImage) -> None:
        """Take back `remember`."""
        key = ref_key(image.reference, image.platform)
        (self.cache.root / "refs" / f"{key}.json").unlink(missing_ok=True)

    def _load(self, key: str, *, touch: bool = False) -> CachedImage | None:
        """The image of one reference record, if every piece is here."""
        record = self.cache.read_record("refs", key)
        if record is None:
            return None
        path = self.cache.root / "refs" / f"{key}.json"
        try:
            digest = record["manifest"]
            manifest = parse_manifest(self.cache.read_blob(digest), f"cached manifest {digest}")
            if not isinstance(manifest, Manifest):
                return None
            config = parse_config(
                self.cache.read_blob(manifest.config.digest), f"cached config {manifest.config.digest}"
            )
            if not all(self.cache.has_blob(layer.digest, layer.size) for layer in manifest.layers):
                return None
            if touch:
                os.utime(path)
            return CachedImage(
                reference=str(record["reference"]),
                digest=digest,
                platform=Platform(
                    os=str(record["os"]),
                    architecture=str(record["architecture"]),
                    variant=str(record["variant"]),
                ),
                manifest=manifest,
                config=config,
                pull_time=float(record["pull_time"]),
                use_time=path.stat().st_mtime,
            )
        except (KeyError, TypeError, ValueError, FileNotFoundError, VoidboxError) as error:
            log.warning("cache record %s is incomplete and ignored: %s", key, error)
            return None

    def list_images(self) -> list[CachedImage]:
        """All complete images, by reference and platform."""
        images = [self._load(key) for key in self.cache.record_keys("refs")]
        return sorted(
            (image for image in images if image is not None),
            key=lambda image: (image.reference, str(image.platform)),
        )

    def get(self, reference: str) -> CachedImage:
        """A cached image by reference or digest; of several platforms the host's.

        Raises:
            NotFound: it is not in the cache.
        """
        matching = self.matching(reference)
        own = host_default()
        matching.sort(key=lambda image: not own.accepts(image.platform))
        return matching[0]

    def matching(self, reference: str) -> list[CachedImage]:
        """All images with a reference or digest, at least one.

        Raises:
            NotFound: there is none.
        """
        reference = reference.strip()
        if is_digest(reference):
            matching = [image for image in self.list_images() if image.digest == reference]
        else:
            name = str(parse_reference(reference))
            matching = [image for image in self.list_images() if image.reference == name]
        if not matching:
            raise NotFound(
                f"{reference} is not in the cache; list images with: voidbox image ls",
                reason="IMAGE_NOT_CACHED",
                reference=reference,
            )
        return matching


def ref_key(reference: str, platform: Platform) -> str:
    """Hex digits that name the record of a reference on a platform."""
    return hashlib.sha256(f"{reference}\n{platform}".encode()).hexdigest()
