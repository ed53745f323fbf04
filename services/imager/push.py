"""Sends cached images to registries, byte for byte as they were pulled. Blocks; use a thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager

from services.common.errors import Cancelled, Corrupt, InvalidInput
from services.imager.cache import COLLECT_LOCK
from services.imager.limits import Cancel
from services.imager.manifest import Descriptor
from services.imager.progress import Progress, Report, silent
from services.imager.pull import ImageStore
from services.imager.reference import RegistryReference, parse_reference
from services.imager.registry_push import Opener, RegistryTarget

Upload = tuple[Descriptor, Opener]


@contextmanager
def open_target(
    store: ImageStore, reference: str, *, insecure: bool, cancel: Cancel
) -> Iterator[tuple[RegistryTarget, str]]:
    """The repository that `reference` names, and the tag in it.

    Raises:
        InvalidInput: it is no tag in a registry.
        Unavailable: the registry does not answer.
    """
    parsed = parse_reference(reference)
    if not isinstance(parsed, RegistryReference):
        raise InvalidInput(
            f"{reference} is a file; push to HOST/NAME:TAG, or write a file with: voidbox image export",
            reason="BAD_REFERENCE",
        )
    if parsed.digest is not None:
        raise InvalidInput(
            f"{reference} names a digest; push to a tag, the content decides its digest",
            reason="BAD_REFERENCE",
        )
    inner = Cancel()
    cancel.on_cancel(inner.cancel)
    try:
        with RegistryTarget(
            parsed, insecure=insecure, settings=store.settings, limits=store.limits, cancel=inner
        ) as target:
            target.connect()
            yield target, parsed.tag or "latest"
    finally:
        cancel.forget(inner.cancel)


def push_image(
    store: ImageStore,
    source: str,
    reference: str,
    *,
    insecure: bool = False,
    cancel: Cancel | None = None,
    report: Report = silent,
) -> str:
    """Push the cached image `source` to `reference`; the digest of its manifest, which does not change.

    Raises:
        NotFound: it is not in the cache.
        InvalidInput: `reference` is no tag in a registry.
        Unauthenticated: the registry wants a login.
        Denied: the login may not push there.
        Unavailable: the registry does not answer.
        Corrupt: a piece is missing from the cache.
        Cancelled: the caller cancelled.
    """
    cancel = cancel or Cancel()
    with store.cache.lock(COLLECT_LOCK, cancel, shared=True):
        image = store.catalog.get(source)
        manifest = store.cache.read_blob(image.digest)
        descriptors = {piece.digest: piece for piece in (image.manifest.config, *image.manifest.layers)}
        uploads = [(piece, _opener(store, piece)) for piece in descriptors.values()]
        with open_target(store, reference, insecure=insecure, cancel=cancel) as (target, tag):
            upload_all(target, uploads, store.settings.parallel_layers, report)
            return target.put_manifest(tag, manifest, image.manifest.media_type)


def upload_all(target: RegistryTarget, uploads: Sequence[Upload], parallel: int, report: Report) -> None:
    """Upload several blobs at once; the first error ends the others."""
    for piece, _ in uploads:
        report(_sent(piece, 0))

    def put(piece: Descriptor, opener: Opener) -> None:
        target.put_blob(piece, opener, lambda count: report(_sent(piece, count)))

    with ThreadPoolExecutor(parallel, "blob-upload") as pool:
        jobs = [pool.submit(put, *upload) for upload in uploads]
        errors = []
        for job in as_completed(jobs):
            error = job.exception()
            if error is not None:
                errors.append(error)
                target.cancel()
    if errors:
        raise next((error for error in errors if not isinstance(error, Cancelled)), errors[0])


def _opener(store: ImageStore, piece: Descriptor) -> Opener:
    path = store.cache.blob_path(piece.digest)
    if not store.cache.has_blob(piece.digest, piece.size):
        raise Corrupt(
            f"{piece.digest} is missing from the cache or damaged; pull the image again",
            reason="BLOB_MISSING",
        )
    return lambda: path.open("rb")


def _sent(piece: Descriptor, count: int) -> Progress:
    return Progress(subject=piece.digest, action="upload", done=count, total=piece.size, unit="bytes")
