"""Reads an OCI image layout, a directory or an archive (image-spec, image-layout.md); trusts nothing."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final, Self

from services.common.errors import InvalidInput, NotFound
from services.imager.files import Files, read_file
from services.imager.limits import Cancel, Limits
from services.imager.manifest import OCI_INDEX, Descriptor, Index, parse_manifest
from services.imager.reference import ArchiveReference, LayoutReference
from services.imager.sources import BlobSink, check_content, check_size, copy_blob

_REF_NAME: Final = "org.opencontainers.image.ref.name"


class LayoutSource:
    """One layout; a context manager.

    Raises:
        NotFound: there is no such directory or file.
        InvalidInput: it is no OCI layout.
    """

    def __init__(
        self,
        reference: LayoutReference | ArchiveReference,
        files: AbstractContextManager[Files],
        limits: Limits,
        cancel: Cancel,
    ) -> None:
        self._reference = reference
        self._limits = limits
        self._cancel = cancel
        self._opening = files
        self._files: Files

    def __enter__(self) -> Self:
        self._files = self._opening.__enter__()
        try:
            self._check_version()
        except BaseException as error:
            self._opening.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opening.__exit__(kind, error, trace)

    def _check_version(self) -> None:
        path = self._reference.path
        try:
            document = json.loads(self._read("oci-layout", 4096))
            version = document["imageLayoutVersion"]
        except (NotFound, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(f"{path} is not an OCI layout: it has no valid file oci-layout") from error
        if not isinstance(version, str) or not version.startswith("1."):
            raise InvalidInput(f"{path}: OCI layout version {version!r} is not 1.x")

    def _read(self, name: str, limit: int) -> bytes:
        return read_file(self._files, name, limit)

    def root(self) -> tuple[bytes, str]:
        """The manifest or index with the tag or digest; without either, the only one or the whole index."""
        reference = self._reference
        data = self._read("index.json", self._limits.manifest_bytes)
        where = str(reference.path / "index.json")
        index = parse_manifest(data, where, media_type=OCI_INDEX)
        if not isinstance(index, Index):
            raise InvalidInput(f"{where} is a manifest, not an index")
        if reference.digest is None and reference.tag is None:
            named = {entry.annotations.get(_REF_NAME) for entry in index.manifests}
            if len(named) > 1 and len(index.manifests) > 1:
                raise InvalidInput(
                    f"{where} holds several images; name one: {reference}:TAG with TAG one of "
                    + ", ".join(sorted(name for name in named if name)),
                    reason="AMBIGUOUS_REFERENCE",
                )
            return data, OCI_INDEX
        matching = [entry for entry in index.manifests if self._matches(entry)]
        if not matching:
            if reference.digest is not None:
                return self._by_digest(reference.digest)
            offered = sorted({entry.annotations.get(_REF_NAME, "") for entry in index.manifests} - {""})
            raise NotFound(
                f"{where} has no tag {reference.tag!r}; it has: {', '.join(offered) or 'none'}",
                reason="NO_SUCH_TAG",
            )
        if len(matching) == 1:
            check_size(matching[0], self._limits.manifest_bytes, f"{where}: manifest")
            return self.manifest(matching[0]), matching[0].media_type
        kept = [entry for entry in json.loads(data)["manifests"] if self._same(entry, matching)]
        return json.dumps({"schemaVersion": 2, "manifests": kept}).encode(), OCI_INDEX

    def _matches(self, entry: Descriptor) -> bool:
        if self._reference.digest is not None:
            return entry.digest == self._reference.digest
        return entry.annotations.get(_REF_NAME) == self._reference.tag

    @staticmethod
    def _same(entry: dict[str, object], matching: list[Descriptor]) -> bool:
        return any(entry.get("digest") == one.digest for one in matching)

    def _by_digest(self, digest: str) -> tuple[bytes, str]:
        """A manifest that only a nested index names."""
        data = self._read(_blob_name(digest), self._limits.manifest_bytes)
        descriptor = Descriptor(media_type="", digest=digest, size=len(data))
        return check_content(data, descriptor, f"{self._reference.path}: manifest"), ""

    def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest or index, verified."""
        return self._verified(descriptor, "manifest")

    def small_blob(self, descriptor: Descriptor) -> bytes:
        """A blob, verified, in memory."""
        return self._verified(descriptor, "blob")

    def _verified(self, descriptor: Descriptor, what: str) -> bytes:
        data = self._read(_blob_name(descriptor.digest), descriptor.size)
        return check_content(data, descriptor, f"{self._reference.path}: {what}")

    def fetch(self, descriptor: Descriptor, sink: BlobSink) -> None:
        """Copy what is missing of a blob."""
        with self._files.open(_blob_name(descriptor.digest)) as file:
            copy_blob(file, sink, self._cancel)


def _blob_name(digest: str) -> str:
    """Relative path of a blob; the digest was checked to be sha256 and 64 hex digits."""
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"
