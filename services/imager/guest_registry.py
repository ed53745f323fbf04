"""Pushes guest images to registries and pulls them back. Everything here blocks; use a thread."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from services.common.errors import Conflict, InvalidInput, NotFound, VoidboxError
from services.imager import guest_artifact as artifact
from services.imager.cache import COLLECT_LOCK
from services.imager.guest_store import (
    SCRATCH,
    GuestImage,
    load_guest_image,
    settle,
    sweep,
    take_over,
    verify_guest_image,
)
from services.imager.limits import Cancel
from services.imager.lock import held
from services.imager.manifest import (
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    Platform,
    host_default,
    parse_manifest,
    select_platform,
)
from services.imager.mirrors import open_registry
from services.imager.progress import Progress, Report, silent
from services.imager.pull import ImageStore, PullPolicy
from services.imager.push import open_target, upload_all
from services.imager.reference import RegistryReference, parse_reference
from services.imager.registry_push import RegistryTarget
from services.imager.sources import Source, check_size

_INDEX_ATTEMPTS: Final = 5  # each lost to another writer


class GuestRegistry:
    """Guest images of the cache directory `cache`, by way of `store`."""

    def __init__(self, store: ImageStore, cache: Path) -> None:
        self._store = store
        self._cache = cache

    def push(
        self,
        name: str,
        reference: str,
        *,
        insecure: bool = False,
        cancel: Cancel | None = None,
        report: Report = silent,
    ) -> str:
        """Push the guest image `name`, a digest or "default", to a tag; the digest of the index there.

        What the tag already has for other architectures stays in the index, also if they are pushed at the
        same time from this cache. From elsewhere too, unless both ask for the tag, both write it and neither
        looks before the other has written: registries have no conditional write. Pushing again heals it.

        Raises:
            NotFound: there is no such guest image.
            Corrupt: it is damaged.
            InvalidInput: `reference` is no tag in a registry.
            Unauthenticated, Denied, Unavailable: as `push_image`.
            Conflict: others kept writing the tag at the same time.
            Cancelled: the caller cancelled.
        """
        cancel = cancel or Cancel()
        image = load_guest_image(self._cache, name)
        verify_guest_image(image)
        platform = Platform(os="linux", architecture=artifact.architecture(image.kernel))
        with ExitStack() as stack:
            target, tag = stack.enter_context(
                open_target(self._store, reference, insecure=insecure, cancel=cancel)
            )
            config, config_bytes = artifact.config_descriptor(image)
            place = stack.enter_context(self._store.cache.scratch_directory())
            uploads = [(config, lambda: io.BytesIO(config_bytes))]
            descriptors = []
            for path, media_type in (
                (image.kernel, artifact.KERNEL),
                (image.initramfs, artifact.INITRAMFS),
            ):
                report(Progress(subject=path.name, action="compress", done=0, total=1))
                out = place / path.name
                with out.open("wb") as file:
                    descriptors.append(artifact.compress(path, file, media_type, cancel))
                uploads.append((descriptors[-1], lambda out=out: out.open("rb")))  # type: ignore[misc]
                report(Progress(subject=path.name, action="compress", done=1, total=1))
            upload_all(target, uploads, self._store.settings.parallel_layers, report)
            manifest = artifact.manifest_bytes(config, *descriptors)
            digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
            target.put_manifest(digest, manifest, OCI_MANIFEST)
            cache = self._store.cache
            stack.enter_context(cache.lock(COLLECT_LOCK, cancel, shared=True))
            stack.enter_context(cache.lock("guest-push", cancel))
            return _add_to_index(target, tag, platform, manifest)

    def pull(
        self,
        reference: str,
        *,
        policy: PullPolicy = PullPolicy.MISSING,
        platform: Platform | None = None,
        insecure: bool = False,
        cancel: Cancel | None = None,
        report: Report = silent,
    ) -> GuestImage:
        """The guest image that `reference` names, whole in the cache.

        Raises:
            InvalidInput: the reference is malformed or names no guest image.
            NotFound: there is none, or it is not cached and the policy is NEVER.
            Corrupt: content does not match its digest.
            Unavailable: the registry does not answer.
            Exhausted: the disk is full; nothing partial is left.
            Cancelled: the caller cancelled.
        """
        parsed = parse_reference(reference)
        if not isinstance(parsed, RegistryReference):
            raise InvalidInput(
                f"{reference}: guest images come from registries, as HOST/NAME:TAG", reason="BAD_REFERENCE"
            )
        cancel = cancel or Cancel()
        wanted = platform or host_default()
        known = self._known(parsed, wanted)
        if known is not None and policy is not PullPolicy.ALWAYS:
            return known[0]
        if policy is PullPolicy.NEVER:
            raise NotFound(
                f"the guest image {parsed} is not in the cache, and the pull policy is 'never'; "
                f"pull it first: voidbox image pull {parsed}",
                reason="IMAGE_NOT_CACHED",
                reference=parsed,
            )
        inner = Cancel()
        cancel.on_cancel(inner.cancel)
        try:
            return self._pull(parsed, wanted, known, insecure, inner, report)
        finally:
            cancel.forget(inner.cancel)

    def _pull(
        self,
        parsed: RegistryReference,
        wanted: Platform,
        known: tuple[GuestImage, str] | None,
        insecure: bool,
        cancel: Cancel,
        report: Report,
    ) -> GuestImage:
        store, where = self._store, str(parsed)
        with (
            store.cache.lock(COLLECT_LOCK, cancel, shared=True),
            open_registry(
                parsed, insecure=insecure, settings=store.settings, limits=store.limits, cancel=cancel
            ) as source,
        ):
            report(Progress(subject=where, action="resolve", done=0, total=1))
            manifest, digest = _resolve(source, wanted, where, store.limits.manifest_bytes)
            report(Progress(subject=where, action="resolve", done=1, total=1))
            if known is not None and known[1] == digest:
                return known[0]
            kernel, initramfs = artifact.guest_layers(manifest, where)
            for layer in (kernel, initramfs):
                check_size(layer, store.limits.compressed_bytes, f"{where}: layer")
            config_bytes = source.small_blob(manifest.config)
            config = artifact.parse_config(config_bytes, where)
            # One at a time: guest images share layers, which go once they are unpacked.
            with store.cache.lock("guest-pull", cancel):
                image = self._whole(config.digest)
                if image is None:
                    store.fetch(source, (kernel, initramfs), where, cancel, report)
                    image = self._unpack(config, config_bytes, kernel, initramfs, cancel, report)
        self._remember(parsed, wanted, image, digest)
        return image

    def _whole(self, digest: str) -> GuestImage | None:
        """The guest image `digest` if it is in the cache and undamaged."""
        try:
            image = load_guest_image(self._cache, digest)
            verify_guest_image(image)
        except (VoidboxError, OSError):
            return None
        return image

    def _unpack(
        self,
        config: artifact.GuestConfig,
        config_bytes: bytes,
        kernel: Descriptor,
        initramfs: Descriptor,
        cancel: Cancel,
        report: Report,
    ) -> GuestImage:
        home = self._cache / "guest"
        home.mkdir(exist_ok=True)
        cache = self._store.cache
        with held(home / "lock", cancel):
            sweep(home)
            scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=home))
            try:
                scratch.chmod(0o755)
                for layer, file, name in (
                    (kernel, config.kernel, "vmlinux"),
                    (initramfs, config.initramfs, "initramfs.cpio"),
                ):
                    report(Progress(subject=name, action="unpack", done=0, total=1))
                    with (scratch / name).open("wb") as out:
                        artifact.unpack(cache.blob_path(layer.digest), file, out, cancel)
                    report(Progress(subject=name, action="unpack", done=1, total=1))
                (scratch / "manifest.json").write_bytes(config_bytes)
                image = take_over(self._cache, scratch, config.digest)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            settle(self._cache, image, make_default=False)
        for layer in (kernel, initramfs):  # kept unpacked only
            cache.blob_path(layer.digest).unlink(missing_ok=True)
        return image

    def _record(self, parsed: RegistryReference, wanted: Platform) -> str:
        return hashlib.sha256(f"{parsed}\n{wanted}".encode()).hexdigest()

    def _remember(self, parsed: RegistryReference, wanted: Platform, image: GuestImage, digest: str) -> None:
        record = {"reference": str(parsed), "guest_image": image.digest, "manifest": digest}
        self._store.cache.write_record("guests", self._record(parsed, wanted), record)

    def _known(self, parsed: RegistryReference, wanted: Platform) -> tuple[GuestImage, str] | None:
        """The guest image that the reference named last and that is still whole, and its manifest."""
        record = self._store.cache.read_record("guests", self._record(parsed, wanted))
        try:
            image = load_guest_image(self._cache, str((record or {})["guest_image"]))
            os.utime(image.directory)  # used now: the oldest are removed first
            return image, str((record or {})["manifest"])
        except (KeyError, OSError, VoidboxError):
            return None


def _add_to_index(target: RegistryTarget, tag: str, platform: Platform, manifest: bytes) -> str:
    """Have the tag name an index with `manifest` and what others have put there; its digest."""
    existing = target.existing()
    for _ in range(_INDEX_ATTEMPTS):
        index = artifact.index_bytes(existing[0] if existing else None, platform, manifest)
        digest = target.put_manifest(tag, index, OCI_INDEX)
        existing = target.existing()
        if existing is None or artifact.index_bytes(existing[0], platform, manifest) == existing[0]:
            return digest if existing is None else f"sha256:{hashlib.sha256(existing[0]).hexdigest()}"
    raise Conflict(
        f"the tag {tag} was written by others {_INDEX_ATTEMPTS} times meanwhile; push again later",
        reason="TAG_CONTENDED",
        tag=tag,
    )


def _resolve(source: Source, wanted: Platform, where: str, limit: int) -> tuple[Manifest, str]:
    """The manifest of the guest image for `wanted`, and its digest."""
    data, media_type = source.root()
    parsed = parse_manifest(data, where, media_type=media_type)
    if isinstance(parsed, Index):
        chosen = select_platform(parsed, wanted, where)
        check_size(chosen, limit, f"{where}: manifest")
        data = source.manifest(chosen)
        parsed = parse_manifest(data, f"{where}: manifest {chosen.digest}", media_type=chosen.media_type)
    if isinstance(parsed, Index):
        raise InvalidInput(f"{where}: an index in an index is no guest image", reason="BAD_MANIFEST")
    return parsed, f"sha256:{hashlib.sha256(data).hexdigest()}"
