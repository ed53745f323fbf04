"""Brings images into the cache, and makes their disks. Everything here blocks; use a thread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path

from services.common.errors import Cancelled, Corrupt, InvalidInput, NotFound
from services.imager.arrival import Arrival
from services.imager.cache import COLLECT_LOCK, ImageCache
from services.imager.disk import DEFAULT_FREE_MIB, Disk, build_disk, disk_key, find_disk
from services.imager.docker_archive import DockerArchiveSource
from services.imager.early import EarlyDisk
from services.imager.files import ArchiveFiles, DirectoryFiles
from services.imager.images import CachedImage, Catalog
from services.imager.layout import LayoutSource
from services.imager.limits import Cancel, Limits
from services.imager.manifest import Descriptor, Platform, host_default
from services.imager.partial import PartialBlob, blob_lock, downloaded, drop_partial
from services.imager.progress import Progress, Report, silent
from services.imager.reference import (
    DockerArchiveReference,
    LayoutReference,
    Reference,
    RegistryReference,
    parse_reference,
)
from services.imager.registry_settings import RegistrySettings
from services.imager.sources import Source, resolve


class PullPolicy(Enum):
    """When the source is asked."""

    ALWAYS = "always"
    MISSING = "missing"
    NEVER = "never"


class ImageStore:
    """Pulls into one cache."""

    def __init__(self, cache: ImageCache, settings: RegistrySettings, limits: Limits | None = None) -> None:
        self.cache = cache
        self.catalog = Catalog(cache)
        self._settings = settings
        self._limits = limits or Limits()

    @property
    def limits(self) -> Limits:
        """What is refused."""
        return self._limits

    @property
    def settings(self) -> RegistrySettings:
        """How registries are talked to."""
        return self._settings

    def pull(
        self,
        reference: str,
        *,
        policy: PullPolicy = PullPolicy.MISSING,
        platform: Platform | None = None,
        insecure: bool = False,
        cancel: Cancel | None = None,
        report: Report = silent,
    ) -> CachedImage:
        """The image, complete in the cache.

        A layout or archive is asked unless the policy is NEVER: that costs nothing.

        Raises:
            InvalidInput: the reference, the platform or the image is malformed.
            NotFound: there is no such image, or it is not cached and the policy is NEVER.
            Unavailable: the registry does not answer.
            Corrupt: content does not match its digest.
            Exhausted: the disk is full; nothing partial is left.
            Cancelled: the caller cancelled.

        After Unavailable and Cancelled the next pull goes on with the layers where this one stopped.
        """
        parsed, cancel = _absolute(reference), cancel or Cancel()
        with self._pulling(cancel) as inner:
            return self._pull(parsed, policy, platform or host_default(), insecure, inner, report)

    def prepare(
        self,
        reference: str,
        *,
        free_mib: int = DEFAULT_FREE_MIB,
        policy: PullPolicy = PullPolicy.MISSING,
        platform: Platform | None = None,
        insecure: bool = False,
        cancel: Cancel | None = None,
        report: Report = silent,
    ) -> tuple[CachedImage, Disk]:
        """The image and its disk, as `pull` and `disk` give them, made while the layers arrive.

        Raises:
            VoidboxError: as `pull` and `disk`. If the disk alone cannot be made, the image is in the cache.
        """
        parsed, cancel = _absolute(reference), cancel or Cancel()
        wanted = platform or host_default()
        with self._pulling(cancel) as inner, EarlyDisk(self.cache, free_mib, self._limits, report) as early:
            image = self._pull(parsed, policy, wanted, insecure, inner, report, early)
            cancel.on_cancel(early.cancel)
            try:
                disk = early.result()
            finally:
                cancel.forget(early.cancel)
        if disk is None:
            disk = self.disk(image, free_mib=free_mib, cancel=cancel, report=report)
        return image, disk

    @contextlib.contextmanager
    def _pulling(self, cancel: Cancel) -> Iterator[Cancel]:
        """What every pull holds; yields what ends it, `cancel` or the first layer that fails."""
        inner = Cancel()
        cancel.on_cancel(inner.cancel)
        try:
            with self.cache.lock(COLLECT_LOCK, cancel, shared=True):
                drop_partial(self.cache)
                yield inner
        finally:
            cancel.forget(inner.cancel)

    def _pull(
        self,
        parsed: Reference,
        policy: PullPolicy,
        wanted: Platform,
        insecure: bool,
        cancel: Cancel,
        report: Report,
        early: EarlyDisk | None = None,
    ) -> CachedImage:
        ask = policy is PullPolicy.ALWAYS or (
            not isinstance(parsed, RegistryReference) and policy is not PullPolicy.NEVER
        )
        if not ask:
            found = self.catalog.find(str(parsed), wanted)
            if found is not None:
                return found
            if policy is PullPolicy.NEVER:
                raise NotFound(
                    f"{parsed} for {wanted} is not in the cache, and the pull policy is 'never'; "
                    f"pull it first: voidbox image pull {parsed}",
                    reason="IMAGE_NOT_CACHED",
                    reference=parsed,
                )
        report(Progress(subject=str(parsed), action="resolve", done=0, total=1))
        with self._open(parsed, insecure, cancel) as source:
            resolved = resolve(source, wanted, str(parsed), self._limits)
            report(Progress(subject=str(parsed), action="resolve", done=1, total=1))
            if early is not None:
                early.begin(resolved.layers)
            self.fetch(source, resolved.manifest.layers, str(parsed), cancel, report, early)
        self.cache.put_blob(resolved.manifest.config.digest, resolved.config_bytes)
        self.cache.put_blob(resolved.digest, resolved.manifest_bytes)
        self.catalog.remember(str(parsed), wanted, resolved.digest, time.time())
        found = self.catalog.find(str(parsed), wanted)
        if found is None:
            raise Corrupt(
                f"{parsed}: the cache lost content while it was pulled; pull again", reason="CACHE_LOST"
            )
        return found

    def _open(self, parsed: Reference, insecure: bool, cancel: Cancel) -> AbstractContextManager[Source]:
        limits, scratch = self._limits, self.cache.root / "tmp"
        if isinstance(parsed, LayoutReference):
            return LayoutSource(parsed, DirectoryFiles(parsed.path), limits, cancel)
        if not isinstance(parsed, RegistryReference):
            files = ArchiveFiles(parsed.path, scratch, limits, cancel)
            if isinstance(parsed, DockerArchiveReference):
                return DockerArchiveSource(parsed, files, limits, cancel)
            return LayoutSource(parsed, files, limits, cancel)
        # A third of a process's start, and archives do not need it.
        from services.imager.mirrors import open_registry

        return open_registry(parsed, insecure=insecure, settings=self.settings, limits=limits, cancel=cancel)

    def fetch(
        self,
        source: Source,
        layers: Sequence[Descriptor],
        where: str,
        cancel: Cancel,
        report: Report,
        early: EarlyDisk | None = None,
    ) -> None:
        """Download what is missing of `layers`, several at once; the first error ends the others.

        The caller holds the cache's `COLLECT_LOCK`, shared.
        """
        missing = {
            layer.digest: layer for layer in layers if not self.cache.has_blob(layer.digest, layer.size)
        }
        if not missing:
            return
        for layer in missing.values():
            report(downloaded(layer, 0))
        with ThreadPoolExecutor(self._settings.parallel_layers, "layer-download") as pool:
            jobs = [
                pool.submit(
                    self._fetch,
                    source,
                    layer,
                    where,
                    cancel,
                    report,
                    early.arrival(layer.digest) if early else None,
                )
                for layer in missing.values()
            ]
            errors = []
            for job in as_completed(jobs):
                error = job.exception()
                if error is not None:
                    errors.append(error)
                    cancel.cancel()
        if errors:
            raise next((error for error in errors if not isinstance(error, Cancelled)), errors[0])

    def _fetch(
        self,
        source: Source,
        layer: Descriptor,
        where: str,
        cancel: Cancel,
        report: Report,
        arrival: Arrival | None,
    ) -> None:
        with self.cache.lock(blob_lock(layer.digest), cancel):
            if not self.cache.has_blob(layer.digest, layer.size):
                with PartialBlob(self.cache, layer, where, cancel, report, arrival) as blob:
                    source.fetch(layer, blob)
                    if blob.resumed and not blob.matches():
                        # What an earlier pull left may have been damaged, e.g. by a power failure.
                        blob.reset()
                        source.fetch(layer, blob)
                    blob.finish()
            elif arrival is not None:
                arrival.finish()  # somebody else has brought it
        report(downloaded(layer, layer.size))

    def disk(
        self,
        image: CachedImage,
        *,
        free_mib: int = DEFAULT_FREE_MIB,
        cancel: Cancel | None = None,
        report: Report = silent,
    ) -> Disk:
        """The read-only disk of `image`; built if it is not there. Errors as `build_disk`."""
        cancel = cancel or Cancel()
        with self.cache.lock(COLLECT_LOCK, cancel, shared=True):
            found = find_disk(self.cache, disk_key(image.config.diff_ids, free_mib))
            if found is not None:
                return found
            return build_disk(
                self.cache,
                image.layers,
                free_mib=free_mib,
                limits=self._limits,
                cancel=cancel,
                report=report,
            )


def _absolute(text: str) -> Reference:
    """The reference; a relative path is refused: a service has no idea where its client is."""
    reference = parse_reference(text)
    if not isinstance(reference, RegistryReference) and not reference.path.is_absolute():
        scheme = str(reference).partition(":")[0]
        raise InvalidInput(
            f"{reference}: the path must be absolute, e.g. {scheme}:{Path('/path/to') / reference.path}",
            reason="BAD_REFERENCE",
        )
    return reference
