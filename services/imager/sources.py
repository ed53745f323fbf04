"""What a place that images come from can do, and how an image is found in it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import BinaryIO, Final, Protocol

from services.common.errors import Corrupt, InvalidInput, NotFound
from services.imager.disk import LayerBlob
from services.imager.limits import Cancel, Limits
from services.imager.manifest import (
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    parse_config,
    parse_manifest,
    require_image,
    select_platform,
)

_MAX_INDEX_DEPTH: Final = 4
_CHUNK: Final = 1 << 20


class BlobSink(Protocol):
    """Where a blob goes, byte after byte; it knows what the blob must be.

    Attributes:
        count: Bytes that it has; a source goes on from there.
    """

    count: int

    def write(self, data: bytes) -> None:
        """Append `data`.

        Raises:
            Corrupt: the blob is longer than its descriptor says.
        """

    def reset(self) -> None:
        """Forget all bytes, because the source begins again."""


class Source(Protocol):
    """A registry, a layout or an archive, opened for one reference. All calls block; use a thread."""

    def root(self) -> tuple[bytes, str]:
        """The manifest or index that the reference names, and its media type."""

    def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest or index, verified."""

    def small_blob(self, descriptor: Descriptor) -> bytes:
        """A blob, verified, in memory; the caller has checked its size."""

    def fetch(self, descriptor: Descriptor, sink: BlobSink) -> None:
        """Bring `sink` what it does not have yet of a blob; the sink's owner verifies the digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedImage:
    """An image that was found, with everything but its layers.

    Attributes:
        digest: Of the manifest.
    """

    digest: str
    manifest_bytes: bytes
    manifest: Manifest
    config_bytes: bytes
    config: ImageConfig

    @property
    def layers(self) -> tuple[LayerBlob, ...]:
        """The layers, lowest first."""
        return tuple(
            LayerBlob(digest=layer.digest, size=layer.size, diff_id=diff_id)
            for layer, diff_id in zip(self.manifest.layers, self.config.diff_ids, strict=True)
        )


def resolve(source: Source, wanted: Platform, where: str, limits: Limits) -> ResolvedImage:
    """Find the image for one platform.

    Raises:
        NotFound: there is none for the platform.
        InvalidInput: a manifest, index or configuration is malformed or no image.
        Corrupt: content does not match its digest.
    """
    data, media_type = source.root()
    parsed = parse_manifest(data, where, media_type=media_type, max_layers=limits.layers)
    depth = 0
    while isinstance(parsed, Index):
        depth += 1
        if depth > _MAX_INDEX_DEPTH:
            raise InvalidInput(
                f"{where}: indexes are nested more than {_MAX_INDEX_DEPTH} deep", reason="BAD_MANIFEST"
            )
        chosen = select_platform(parsed, wanted, where)
        check_size(chosen, limits.manifest_bytes, f"{where}: manifest")
        data = source.manifest(chosen)
        where_now = f"{where}: manifest {chosen.digest}"
        parsed = parse_manifest(data, where_now, media_type=chosen.media_type, max_layers=limits.layers)
    require_image(parsed, where)
    check_size(parsed.config, limits.config_bytes, f"{where}: config")
    config_bytes = source.small_blob(parsed.config)
    config = parse_config(config_bytes, f"{where}: config {parsed.config.digest}")
    if config.platform.architecture and not wanted.accepts(config.platform):
        raise NotFound(
            f"{where} is an image for {config.platform}, not for {wanted}",
            reason="NO_SUCH_PLATFORM",
            platform=wanted,
        )
    if len(config.diff_ids) != len(parsed.layers):
        raise InvalidInput(
            f"{where}: {len(parsed.layers)} layers, but the config lists {len(config.diff_ids)}",
            reason="BAD_MANIFEST",
        )
    for layer in parsed.layers:
        check_size(layer, limits.compressed_bytes, f"{where}: layer")
    return ResolvedImage(
        digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
        manifest_bytes=data,
        manifest=parsed,
        config_bytes=config_bytes,
        config=config,
    )


def copy_blob(file: BinaryIO, sink: BlobSink, cancel: Cancel) -> None:
    """Append to `sink` what it does not have yet of `file`."""
    file.seek(sink.count)
    while data := file.read(_CHUNK):
        cancel.check()
        sink.write(data)


def check_size(descriptor: Descriptor, limit: int, what: str) -> None:
    """Refuse content that says itself that it is too large.

    Raises:
        InvalidInput: it is.
    """
    if descriptor.size > limit:
        raise InvalidInput(
            f"{what} {descriptor.digest} has {descriptor.size} bytes; the limit is {limit}",
            reason="IMAGE_TOO_LARGE",
        )


def check_content(data: bytes, descriptor: Descriptor, what: str) -> bytes:
    """`data`, if it is what `descriptor` says.

    Raises:
        Corrupt: its length or digest is another.
    """
    if len(data) != descriptor.size:
        raise Corrupt(
            f"{what} {descriptor.digest} has {len(data)} bytes, its descriptor says {descriptor.size}",
            reason="WRONG_SIZE",
            digest=descriptor.digest,
        )
    check_digest(data, descriptor.digest, what)
    return data


def check_digest(data: bytes, digest: str, what: str) -> None:
    """Refuse `data` if its digest is another.

    Raises:
        Corrupt: it is.
    """
    found = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if found != digest:
        raise Corrupt(f"{what} {digest} has the digest {found}", reason="WRONG_DIGEST", digest=digest)
