"""Reads an OCI image layout directory (image-spec, image-layout.md). Nothing in it is trusted."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, Self

from services.common.errors import Corrupt, InvalidInput, NotFound
from services.imager.limits import Cancel, Limits
from services.imager.manifest import OCI_INDEX, Descriptor, Index, parse_manifest
from services.imager.reference import LayoutReference
from services.imager.sources import check_content, check_size

_REF_NAME: Final = "org.opencontainers.image.ref.name"
_CHUNK: Final = 1 << 20


class LayoutSource:
    """One layout, opened by directory descriptor; a context manager.

    Raises:
        NotFound: there is no such directory.
        InvalidInput: it is no OCI layout.
    """

    def __init__(self, reference: LayoutReference, limits: Limits, cancel: Cancel) -> None:
        self._reference = reference
        self._limits = limits
        self._cancel = cancel
        self._directory = -1

    def __enter__(self) -> Self:
        path = self._reference.directory
        try:
            self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound(
                f"{path}: {error.strerror}; it must be an OCI layout directory", path=path
            ) from error
        try:
            self._check_version()
        except BaseException:
            os.close(self._directory)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._directory)

    def _check_version(self) -> None:
        path = self._reference.directory
        try:
            document = json.loads(self._read("oci-layout", 4096))
            version = document["imageLayoutVersion"]
        except (NotFound, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(f"{path} is not an OCI layout: it has no valid file oci-layout") from error
        if not isinstance(version, str) or not version.startswith("1."):
            raise InvalidInput(f"{path}: OCI layout version {version!r} is not 1.x")

    def _open(self, name: str) -> BinaryIO:
        """A regular file below the layout; `name` was built by us from checked parts."""
        place = self._reference.directory / name
        try:
            # O_NONBLOCK: a FIFO planted here must not hang us.
            handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError as error:
            raise NotFound(f"{place}: {error.strerror}", reason="BLOB_MISSING", path=place) from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise InvalidInput(f"{place} is not a regular file", path=place)
        return os.fdopen(handle, "rb", buffering=0)

    def _read(self, name: str, limit: int) -> bytes:
        with self._open(name) as file:
            parts, left = [], limit + 1
            while left and (data := file.read(left)):
                parts.append(data)
                left -= len(data)
        if not left:
            raise InvalidInput(f"{self._reference.directory / name} is longer than {limit} bytes")
        return b"".join(parts)

    def root(self) -> tuple[bytes, str]:
        """The manifest or index with the tag or digest; without either, the only one or the whole index."""
        reference = self._reference
        data = self._read("index.json", self._limits.manifest_bytes)
        where = str(reference.directory / "index.json")
        index = parse_manifest(data, where, media_type=OCI_INDEX)
        if not isinstance(index, Index):
            raise InvalidInput(f"{where} is a manifest, not an index")
        if reference.digest is None and reference.tag is None:
            named = {entry.annotations.get(_REF_NAME) for entry in index.manifests}
            if len(named) > 1 and len(index.manifests) > 1:
                raise InvalidInput(
                    f"{where} holds several images; name one: oci:{reference.directory}:TAG with TAG one of "
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
        return check_content(data, descriptor, f"{self._reference.directory}: manifest"), ""

    def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest or index, verified."""
        return self._verified(descriptor, "manifest")

    def small_blob(self, descriptor: Descriptor) -> bytes:
        """A blob, verified, in memory."""
        return self._verified(descriptor, "blob")

    def _verified(self, descriptor: Descriptor, what: str) -> bytes:
        data = self._read(_blob_name(descriptor.digest), descriptor.size)
        return check_content(data, descriptor, f"{self._reference.directory}: {what}")

    def fetch(self, descriptor: Descriptor, target: BinaryIO, done: Callable[[int], None]) -> None:
        """Copy a blob to `target`, verified."""
        what = f"{self._reference.directory}: layer {descriptor.digest}"
        digest = hashlib.sha256()
        count = 0
        with self._open(_blob_name(descriptor.digest)) as file:
            while data := file.read(_CHUNK):
                self._cancel.check()
                count += len(data)
                if count > descriptor.size:
                    break
                digest.update(data)
                target.write(data)
                done(count)
        if count != descriptor.size:
            more = "more than " if count > descriptor.size else ""
            found = descriptor.size if more else count
            raise Corrupt(
                f"{what} has {more}{found} bytes, its descriptor says {descriptor.size}",
                reason="WRONG_SIZE",
                digest=descriptor.digest,
            )
        if f"sha256:{digest.hexdigest()}" != descriptor.digest:
            raise Corrupt(
                f"{what} has the digest sha256:{digest.hexdigest()}",
                reason="WRONG_DIGEST",
                digest=descriptor.digest,
            )


def _blob_name(digest: str) -> str:
    """Relative path of a blob; the digest was checked to be sha256 and 64 hex digits."""
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def absolute(reference: LayoutReference) -> LayoutReference:
    """`reference`, if its directory is absolute.

    Raises:
        InvalidInput: it is relative; a service has no idea where its client is.
    """
    if not reference.directory.is_absolute():
        raise InvalidInput(
            f"{reference}: the directory must be absolute, e.g. oci:{Path('/path/to') / reference.directory}",
            reason="BAD_REFERENCE",
        )
    return reference
