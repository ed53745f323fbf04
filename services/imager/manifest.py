"""Manifests, indexes and image configurations: JSON from strangers to checked dataclasses.

Sources: OCI image-spec (manifest.md, image-index.md, config.md) and Docker's image manifest
version 2, schema 2, which differ only in media types.
"""

from __future__ import annotations

import json
import platform as host_platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

from services.common.errors import InvalidInput, NotFound
from services.imager.reference import is_digest

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_TYPES: Final = (OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_INDEX)
_CONFIG_TYPES: Final = {
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
}
_LAYER_PREFIXES: Final = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)
_LAYER_SUFFIXES: Final = {"", "+gzip", ".gzip", "+zstd", ".zstd"}
_MAX_MANIFESTS: Final = 4096
_MAX_URLS: Final = 8
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
# Names that builders and kernels use, in Go's words (containerd, platforms/database.go).
_ALIASES: Final = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "i386": ("386", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
}
# What an empty variant means. A processor of one level runs programs for all lower ones.
_USUAL_VARIANTS: Final = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
_LEVEL: Final = re.compile(r"v([0-9]{1,3})(?:\.([0-9]{1,3}))?", re.ASCII)
_WORD: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """Operating system and architecture, in Go's words."""

    os: str
    architecture: str
    variant: str = ""

    def accepts(self, other: Platform) -> bool:
        """Whether programs for `other` run on this platform."""
        mine, theirs = self._normal(), other._normal()
        if (mine.os, mine.architecture) != (theirs.os, theirs.architecture):
            return False
        own, level = mine.level, theirs.level
        return level <= own if own and level else mine.variant == theirs.variant

    @property
    def level(self) -> tuple[int, int]:
        """The variant as numbers, larger for newer processors; () for what is no number."""
        normal = self._normal()
        usual = _USUAL_VARIANTS.get(normal.architecture)
        found = _LEVEL.fullmatch(normal.variant or usual or "") if usual else None
        return (int(found[1]), int(found[2] or 0)) if found else ()  # type: ignore[return-value]

    def _normal(self) -> Platform:
        architecture = self.architecture.lower()
        architecture, implied = _ALIASES.get(architecture, (architecture, ""))
        return Platform(
            os=self.os.lower(), architecture=architecture, variant=self.variant.lower() or implied
        )

    def checked(self) -> Platform:
        """Itself by its usual names.

        Raises:
            InvalidInput: a part is no name, or boxes cannot run such images.
        """
        for part in (self.os, self.architecture, *([self.variant] if self.variant else [])):
            if not _WORD.fullmatch(part):
                raise InvalidInput(
                    f"{part[:100]!r} in a platform is not 1 to 64 letters, digits, '_', '.' or '-'; "
                    "write e.g. linux/amd64 or linux/arm/v7",
                    reason="BAD_PLATFORM",
                )
        normal = self._normal()
        if normal.os != "linux":
            raise InvalidInput(
                f"images for {normal.os} do not run in boxes; use linux", reason="BAD_PLATFORM"
            )
        return normal

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def host_default() -> Platform:
    """Linux on this machine's architecture."""
    machine = host_platform.machine()
    return Platform(os="linux", architecture=_ARCHITECTURES.get(machine, machine))


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A pointer to content by digest.

    Attributes:
        urls: Where else it is, for layers that registries may not hand on ("foreign").
    """

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    urls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Pointers to the manifests of several platforms, or to further indexes."""

    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One image: its configuration and its layers, lowest first."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """How an image wants to be run, and the digests of its uncompressed layers."""

    platform: Platform
    diff_ids: tuple[str, ...]
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def parse_manifest(
    data: bytes, where: str, *, media_type: str = "", max_layers: int = 512
) -> Manifest | Index:
    """A manifest or an index, told apart by its own `mediaType`, `media_type`, or its contents.

    Args:
        data: The JSON document.
        where: Names it in errors.
        media_type: What the transport says it is, if anything.
        max_layers: More are refused.

    Raises:
        InvalidInput: it is neither, or malformed.
    """
    document = _Reader(_load(data, where), where)
    own = document.text("mediaType") or media_type
    if "manifests" in document.value and ("layers" in document.value or "config" in document.value):
        raise InvalidInput(f"{where} is a manifest and an index at once", reason="BAD_MANIFEST")
    if own in MANIFEST_TYPES and media_type in MANIFEST_TYPES and own != media_type:
        raise InvalidInput(f"{where} is served as {media_type} and says it is {own}", reason="BAD_MANIFEST")
    if document.integer("schemaVersion") != 2:
        raise InvalidInput(
            f"{where}: schemaVersion is not 2; Docker's schema 1 is obsolete, push the image again",
            reason="BAD_MANIFEST",
        )
    if own in (OCI_INDEX, DOCKER_INDEX) or (own not in MANIFEST_TYPES and "manifests" in document.value):
        entries = document.items("manifests")
        if len(entries) > _MAX_MANIFESTS:
            raise InvalidInput(f"{where}: an index of {len(entries)} manifests", reason="BAD_MANIFEST")
        return Index(manifests=tuple(_descriptor(entry) for entry in entries))
    layers = document.items("layers")
    if len(layers) > max_layers:
        raise InvalidInput(
            f"{where}: {len(layers)} layers; at most {max_layers} are read", reason="BAD_MANIFEST"
        )
    return Manifest(
        media_type=own or OCI_MANIFEST,
        config=_descriptor(document.child("config")),
        layers=tuple(_descriptor(layer) for layer in layers),
    )


def require_image(manifest: Manifest, where: str) -> None:
    """Refuse manifests of artifacts that are no container images.

    Raises:
        InvalidInput: the configuration or a layer has another media type.
    """
    if manifest.config.media_type not in _CONFIG_TYPES:
        raise InvalidInput(
            f"{where} is no container image but an artifact of type {manifest.config.media_type!r}",
            reason="NOT_AN_IMAGE",
        )
    for layer in manifest.layers:
        prefix = next((prefix for prefix in _LAYER_PREFIXES if layer.media_type.startswith(prefix)), None)
        if prefix is None or layer.media_type[len(prefix) :] not in _LAYER_SUFFIXES:
            raise InvalidInput(
                f"{where}: layer {layer.digest} has the type {layer.media_type!r}, not that of files",
                reason="NOT_AN_IMAGE",
            )


def select_platform(index: Index, wanted: Platform, where: str) -> Descriptor:
    """The manifest for `wanted`; an entry that names no platform is taken if it is the only one.

    Raises:
        NotFound: there is none; the message lists those that there are.
    """
    candidates = [entry for entry in index.manifests if entry.media_type in MANIFEST_TYPES]
    best: Descriptor | None = None
    for entry in candidates:  # the first of those for the newest processor that this one is
        if not entry.platform or not wanted.accepts(entry.platform):
            continue
        if best is None or best.platform is None or entry.platform.level > best.platform.level:
            best = entry
    if best is not None:
        return best
    for entry in candidates:  # an index in an index often has no platform itself
        if entry.platform is None and (entry.media_type in (OCI_INDEX, DOCKER_INDEX) or len(candidates) == 1):
            return entry
    offered = sorted({str(entry.platform) for entry in candidates if entry.platform})
    raise NotFound(
        f"{where} has no image for {wanted}; it has: {', '.join(offered) or 'none'}",
        reason="NO_SUCH_PLATFORM",
        platform=wanted,
    )


def parse_config(data: bytes, where: str) -> ImageConfig:
    """An image configuration.

    Raises:
        InvalidInput: it is malformed.
    """
    document = _Reader(_load(data, where), where)
    rootfs = document.child("rootfs")
    diff_ids = rootfs.strings("diff_ids")
    for diff_id in diff_ids:
        if not is_digest(diff_id):
            raise InvalidInput(f"{where}: {diff_id[:100]!r} is not a sha256 digest", reason="BAD_CONFIG_BLOB")
    run = document.child("config") if document.value.get("config") is not None else _Reader({}, where)
    return ImageConfig(
        platform=Platform(
            os=document.text("os") or "linux",
            architecture=document.text("architecture"),
            variant=document.text("variant"),
        ),
        diff_ids=tuple(diff_ids),
        entrypoint=tuple(run.strings("Entrypoint")),
        cmd=tuple(run.strings("Cmd")),
        env=tuple(run.strings("Env")),
        working_dir=run.text("WorkingDir"),
        user=run.text("User"),
        labels=run.mapping("Labels"),
    )


def _load(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where} is not JSON: {error}", reason="BAD_MANIFEST") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{where} is not a JSON object", reason="BAD_MANIFEST")
    return value


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string that UTF-8 can carry; JSON may hold half surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Reader:
    """Takes typed fields out of a JSON object; `null` counts as missing."""

    def __init__(self, value: dict[str, Any], where: str) -> None:
        self.value = value
        self.where = where

    def _wrong(self, key: str, wanted: str) -> InvalidInput:
        return InvalidInput(f"{self.where}: {key!r} is not {wanted}", reason="BAD_MANIFEST")

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if value is None:
            return ""
        if not _is_text(value):
            raise self._wrong(key, "a string")
        return value

    def integer(self, key: str) -> int:
        value = self.value.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
            raise self._wrong(key, "a number from 0 to 2^63 - 1")
        return value

    def child(self, key: str) -> _Reader:
        value = self.value.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return _Reader(value, f"{self.where}: {key}")

    def items(self, key: str) -> Sequence[_Reader]:
        value = self.value.get(key)
        if value is None:
            value = []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(key, "a list of objects")
        return [_Reader(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(value)]

    def strings(self, key: str) -> list[str]:
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(_is_text(item) for item in value):
            raise self._wrong(key, "a list of strings")
        return value

    def mapping(self, key: str) -> dict[str, str]:
        value = self.value.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(_is_text(item) for pair in value.items() for item in pair):
            raise self._wrong(key, "an object of strings")
        return value


def _descriptor(reader: _Reader) -> Descriptor:
    digest = reader.text("digest")
    if not is_digest(digest):
        raise InvalidInput(
            f"{reader.where}: the digest {digest[:100]!r} is not sha256", reason="BAD_MANIFEST"
        )
    size = reader.integer("size")
    platform = None
    if reader.value.get("platform") is not None:
        child = reader.child("platform")
        platform = Platform(
            os=child.text("os"), architecture=child.text("architecture"), variant=child.text("variant")
        )
    return Descriptor(
        media_type=reader.text("mediaType"),
        digest=digest,
        size=size,
        platform=platform,
        annotations=reader.mapping("annotations"),
        urls=tuple(reader.strings("urls")[:_MAX_URLS]),
    )
