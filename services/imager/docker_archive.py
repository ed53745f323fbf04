"""Reads archives that `docker save` writes, of all its vintages, as if they were in a registry.

- Since Docker 1.10 `manifest.json` lists images: configuration, names, layers (moby, image/tarexport).
  Layers are `ID/layer.tar`, sometimes links to each other; since 25.0 `blobs/sha256/HEX`.
- Before, `repositories` names the top layer, and each `ID/json` its parent (Docker image spec v1).

No manifest is stored, so one is made here, the same for the same archive. A layer's digest is that
of its name, or the diff id of the configuration if it is not compressed; only else it is computed.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from services.common.errors import Corrupt, InvalidInput, NotFound, VoidboxError
from services.imager.files import ArchiveFiles, read_file
from services.imager.limits import Cancel, Limits
from services.imager.manifest import DOCKER_MANIFEST, Descriptor, parse_config
from services.imager.reference import DockerArchiveReference, RegistryReference, parse_reference
from services.imager.sources import BlobSink, check_content, copy_blob

_CONFIG_TYPE: Final = "application/vnd.docker.container.image.v1+json"
_LAYER_TYPE: Final = "application/vnd.docker.image.rootfs.diff.tar"
_SUFFIXES: Final = {b"\x1f\x8b": ".gzip", b"\x28\xb5\x2f\xfd": ".zstd"}
_BLOB: Final = re.compile(r"blobs/sha256/([0-9a-f]{64})")
_HEX: Final = re.compile(r"([0-9a-f]{64})\.json")
_CHUNK: Final = 1 << 20
_MAX_LISTED: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Image:
    """One image of the archive: normalised names, and the members that it is made of."""

    names: tuple[str, ...]
    config: bytes
    layers: tuple[str, ...]


class DockerArchiveSource:
    """One image of one archive; a context manager.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it is no archive of images.
        Corrupt: it is damaged.
    """

    def __init__(
        self,
        reference: DockerArchiveReference,
        files: AbstractContextManager[ArchiveFiles],
        limits: Limits,
        cancel: Cancel,
    ) -> None:
        self._reference, self._limits, self._cancel = reference, limits, cancel
        self._opening = files
        self._files: ArchiveFiles
        self._members: dict[str, str] = {}
        self._config = b""

    def __enter__(self) -> Self:
        self._files = self._opening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opening.__exit__(kind, error, trace)

    def root(self) -> tuple[bytes, str]:
        """A manifest of the image that the reference names, or of the only one."""
        image = self._chosen(self._images())
        where = str(self._reference)
        diff_ids = parse_config(image.config, f"{where}: config").diff_ids
        if len(diff_ids) != len(image.layers):
            raise InvalidInput(
                f"{where}: {len(image.layers)} layers, but the config lists {len(diff_ids)}",
                reason="BAD_MANIFEST",
            )
        layers = [self._describe(*pair) for pair in zip(image.layers, diff_ids, strict=True)]
        self._config = image.config
        config = {
            "mediaType": _CONFIG_TYPE,
            "size": len(image.config),
            "digest": f"sha256:{hashlib.sha256(image.config).hexdigest()}",
        }
        document = {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": config,
            "layers": layers,
        }
        return json.dumps(document, sort_keys=True).encode(), DOCKER_MANIFEST

    def _describe(self, name: str, diff_id: str) -> dict[str, Any]:
        """The descriptor of one layer."""
        with self._files.open(name) as file:
            head = file.read(4)
            suffix = next((suffix for magic, suffix in _SUFFIXES.items() if head.startswith(magic)), "")
            blob = _BLOB.fullmatch(name)
            if blob:
                digest = f"sha256:{blob[1]}"
            elif suffix:
                digest = self._hash(name)
            else:
                digest = diff_id
        self._members.setdefault(digest, name)
        return {"mediaType": _LAYER_TYPE + suffix, "size": self._files.size(name), "digest": digest}

    def _hash(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._files.open(name) as file:
            while data := file.read(_CHUNK):
                self._cancel.check()
                digest.update(data)
        return f"sha256:{digest.hexdigest()}"

    def manifest(self, descriptor: Descriptor) -> bytes:
        """Nothing: there are no indexes here."""
        raise NotFound(f"{self._reference} has no manifest {descriptor.digest}", reason="BLOB_MISSING")

    def small_blob(self, descriptor: Descriptor) -> bytes:
        """The configuration."""
        return check_content(self._config, descriptor, f"{self._reference}: config")

    def fetch(self, descriptor: Descriptor, sink: BlobSink) -> None:
        """Copy what is missing of a layer."""
        with self._files.open(self._members[descriptor.digest]) as file:
            copy_blob(file, sink, self._cancel)

    # --- which images there are ------------------------------------------------------------------

    def _chosen(self, images: list[_Image]) -> _Image:
        reference = self._reference
        if reference.index is not None:
            if reference.index >= len(images):
                raise NotFound(
                    f"{reference.path} holds {len(images)} images, the first is @0", reason="NO_SUCH_TAG"
                )
            return images[reference.index]
        offered = [name for image in images for name in image.names]
        if reference.name is None:
            if len(images) != 1:
                raise InvalidInput(
                    f"{reference.path} holds {len(images)} images; name one: {reference}:NAME with NAME "
                    f"one of {_listed(offered)}, or {reference}:@NUMBER",
                    reason="AMBIGUOUS_REFERENCE",
                )
            return images[0]
        for image in images:
            if reference.name in image.names:
                return image
        raise NotFound(
            f"{reference.path} has no image {reference.name}; it has: {_listed(offered)}",
            reason="NO_SUCH_TAG",
        )

    def _images(self) -> list[_Image]:
        if "manifest.json" in self._files:
            return self._listed_images()
        if "repositories" in self._files:
            return self._chained_images()
        raise InvalidInput(
            f"{self._reference.path} is no archive of `docker save`: it has neither manifest.json nor "
            "repositories" + ("; use oci-archive: for it" if "oci-layout" in self._files else ""),
            reason="BAD_MANIFEST",
        )

    def _listed_images(self) -> list[_Image]:
        where = f"{self._reference.path}: manifest.json"
        entries = self._json("manifest.json", self._limits.manifest_bytes)
        if not isinstance(entries, list):
            raise InvalidInput(f"{where} is not a list", reason="BAD_MANIFEST")
        images = []
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get("Config"), str):
                raise InvalidInput(f"{where}: an entry has no Config", reason="BAD_MANIFEST")
            layers, tags = entry.get("Layers") or [], entry.get("RepoTags") or []
            if not _are_strings(layers) or not _are_strings(tags):
                raise InvalidInput(
                    f"{where}: Layers and RepoTags must be lists of strings", reason="BAD_MANIFEST"
                )
            if len(layers) > self._limits.layers:
                raise InvalidInput(
                    f"{where}: {len(layers)} layers; at most {self._limits.layers} are read",
                    reason="BAD_MANIFEST",
                )
            config = self._named_config(entry["Config"])
            images.append(_Image(names=_names(tags), config=config, layers=tuple(layers)))
        return images

    def _named_config(self, name: str) -> bytes:
        data = read_file(self._files, name, self._limits.config_bytes)
        named = _HEX.fullmatch(name) or _BLOB.fullmatch(name)
        if named and hashlib.sha256(data).hexdigest() != named[1]:
            raise Corrupt(f"{self._reference.path}: {name} is not what its name says", reason="WRONG_DIGEST")
        return data

    def _chained_images(self) -> list[_Image]:
        where = f"{self._reference.path}: repositories"
        document = self._json("repositories", self._limits.manifest_bytes)
        if not isinstance(document, dict):
            raise InvalidInput(f"{where} is not an object", reason="BAD_MANIFEST")
        tops: dict[str, list[str]] = {}
        for name, tags in document.items():
            if not isinstance(tags, dict) or not _are_strings(list(tags.values())):
                raise InvalidInput(
                    f"{where}: {name[:100]!r} is not an object of strings", reason="BAD_MANIFEST"
                )
            for tag, top in tags.items():
                tops.setdefault(top, []).append(f"{name}:{tag}")
        wanted = self._reference.name
        # Each costs a pass over its layers, so those that are not asked for are only counted.
        return [
            self._chain(top, _names(tags))
            if len(tops) == 1 or wanted in _names(tags) or self._reference.index == number
            else _Image(names=_names(tags), config=b"", layers=())
            for number, (top, tags) in enumerate(tops.items())
        ]

    def _chain(self, top: str, names: tuple[str, ...]) -> _Image:
        """The image whose top layer is `top`: layers from the bottom, and a configuration like today's."""
        documents: list[tuple[str, dict[str, Any]]] = []
        layer: str | None = top
        while layer:
            if len(documents) >= self._limits.layers:
                raise InvalidInput(
                    f"{self._reference.path}: the parents of {top[:100]!r} do not end, or are more than "
                    f"{self._limits.layers}",
                    reason="BAD_MANIFEST",
                )
            document = self._json(f"{layer}/json", self._limits.config_bytes)
            if not isinstance(document, dict) or not isinstance(document.get("parent", ""), str):
                raise InvalidInput(
                    f"{self._reference.path}: {layer[:100]}/json is malformed", reason="BAD_MANIFEST"
                )
            documents.append((layer, document))
            layer = document.get("parent")
        documents.reverse()
        layers = tuple(f"{name}/layer.tar" for name, _ in documents)
        last = documents[-1][1]
        config: dict[str, Any] = {
            **{key: last[key] for key in ("architecture", "os", "config", "created") if key in last},
            "rootfs": {"type": "layers", "diff_ids": [self._hash(layer) for layer in layers]},
        }
        return _Image(names=names, config=json.dumps(config, sort_keys=True).encode(), layers=layers)

    def _json(self, name: str, limit: int) -> Any:
        try:
            return json.loads(read_file(self._files, name, limit))
        except (ValueError, RecursionError) as error:
            raise InvalidInput(
                f"{self._reference.path}: {name[:100]} is not JSON: {error}", reason="BAD_MANIFEST"
            ) from error


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _names(tags: list[str]) -> tuple[str, ...]:
    """Normalised; what is no name, such as `<none>:<none>`, is left out."""
    names = []
    for tag in tags:
        try:
            parsed = parse_reference(tag)
        except VoidboxError:
            continue
        if isinstance(parsed, RegistryReference):
            names.append(str(parsed))
    return tuple(names)


def _listed(names: list[str]) -> str:
    return (", ".join(sorted(names)[:_MAX_LISTED]) or "none") + (" …" if len(names) > _MAX_LISTED else "")
