"""Guest images as OCI artifacts: an index of one manifest per architecture.

    config     what the image was made of: its `manifest.json`
    layers     kernel and initramfs, each compressed by zstd

The same guest image gives the same manifest. What comes back is checked three times: blobs by
their digests, the files in them by those in the config, and both together by the image's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import zstandard

from services.common.errors import Corrupt, InvalidInput
from services.imager.guest_store import GuestImage, image_digest
from services.imager.limits import GIB, Cancel
from services.imager.manifest import (
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    Platform,
)

ARTIFACT: Final = "application/vnd.voidbox.guest.v1"
CONFIG: Final = "application/vnd.voidbox.guest.config.v1+json"
KERNEL: Final = "application/vnd.voidbox.guest.kernel.v1+zstd"
INITRAMFS: Final = "application/vnd.voidbox.guest.initramfs.v1.cpio+zstd"
MAX_CONFIG_BYTES: Final = 1 << 20
_MAX_FILE: Final = 4 * GIB  # a kernel and an initramfs have to fit into a box's memory
_LEVEL: Final = 12
_CHUNK: Final = 1 << 20
_HEX: Final = re.compile(r"[0-9a-f]{64}")
# e_machine of ELF: the kernel says which processor it is for.
_MACHINES: Final = {62: "amd64", 183: "arm64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestFile:
    """One file of a guest image: its length and the hex digits of its digest."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestConfig:
    """What an artifact says of the guest image in it."""

    digest: str
    kernel: GuestFile
    initramfs: GuestFile


def architecture(kernel: Path) -> str:
    """The processor that a kernel is for, in Go's words.

    Raises:
        InvalidInput: it is none that is known.
    """
    with kernel.open("rb") as file:
        head = file.read(64)
    machine = int.from_bytes(head[18:20], "little") if head[:4] == b"\x7fELF" else 0
    found = "arm64" if head[0x38:0x3C] == b"ARM\x64" else _MACHINES.get(machine)
    if found is None:
        raise InvalidInput(f"{kernel} is for a processor that is not known", reason="NOT_A_KERNEL")
    return found


def compress(source: Path, out: BinaryIO, media_type: str, cancel: Cancel) -> Descriptor:
    """Write `source` compressed to `out`; what describes the result."""
    digest, size = hashlib.sha256(), 0
    packer = zstandard.ZstdCompressor(level=_LEVEL).compressobj(size=source.stat().st_size)
    with source.open("rb", buffering=0) as file:
        while True:
            cancel.check()
            data = file.read(_CHUNK)
            packed = packer.compress(data) if data else packer.flush()
            out.write(packed)
            digest.update(packed)
            size += len(packed)
            if not data:
                break
    out.flush()
    return Descriptor(media_type=media_type, digest=f"sha256:{digest.hexdigest()}", size=size)


def unpack(blob: Path, wanted: GuestFile, out: BinaryIO, cancel: Cancel) -> None:
    """Write the file in `blob` to `out`, not a byte more than `wanted` says.

    Raises:
        Corrupt: it is another file.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with blob.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
            while data := reader.read(_CHUNK):
                cancel.check()
                size += len(data)
                if size > wanted.size:
                    break
                digest.update(data)
                out.write(data)
    except zstandard.ZstdError as error:
        raise Corrupt(f"{blob.name} is not compressed by zstd: {error}", reason="BAD_GUEST_IMAGE") from error
    if size != wanted.size or digest.hexdigest() != wanted.sha256:
        raise Corrupt(
            f"the guest image's file in sha256:{blob.name} is not the one that its config describes",
            reason="WRONG_DIGEST",
        )


def manifest_bytes(config: Descriptor, kernel: Descriptor, initramfs: Descriptor) -> bytes:
    """The manifest of one architecture's guest image."""
    return _json(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": ARTIFACT,
            "config": _plain(config),
            "layers": [_plain(kernel, title="vmlinux.zst"), _plain(initramfs, title="initramfs.cpio.zst")],
        }
    )


def index_bytes(existing: bytes | None, platform: Platform, manifest: bytes) -> bytes:
    """An index of `manifest` and of what `existing` has for other platforms, if that is one of ours."""
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    entry = {
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT,
        "digest": digest,
        "size": len(manifest),
        "platform": {"architecture": platform.architecture, "os": platform.os},
    }
    others = [item for item in _own_entries(existing) if item.get("platform") != entry["platform"]]
    entries = sorted([*others, entry], key=lambda item: json.dumps(item.get("platform"), sort_keys=True))
    return _json({"schemaVersion": 2, "mediaType": OCI_INDEX, "artifactType": ARTIFACT, "manifests": entries})


def _own_entries(existing: bytes | None) -> list[dict[str, Any]]:
    try:
        document = json.loads(existing or b"{}")
        entries = document.get("manifests", []) if document.get("artifactType") == ARTIFACT else []
        return [item for item in entries if isinstance(item, dict)]
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []


def guest_layers(manifest: Manifest, where: str) -> tuple[Descriptor, Descriptor]:
    """Kernel and initramfs of an artifact's manifest.

    Raises:
        InvalidInput: it is no guest image.
    """
    types = [layer.media_type for layer in manifest.layers]
    if manifest.config.media_type != CONFIG or types != [KERNEL, INITRAMFS]:
        raise InvalidInput(
            f"{where} is no guest image: its config is of type {manifest.config.media_type!r}",
            reason="NOT_A_GUEST_IMAGE",
        )
    if manifest.config.size > MAX_CONFIG_BYTES:
        raise InvalidInput(f"{where}: a config of {manifest.config.size} bytes", reason="IMAGE_TOO_LARGE")
    return manifest.layers[0], manifest.layers[1]


def parse_config(data: bytes, where: str) -> GuestConfig:
    """What the config, which comes from strangers, says.

    Raises:
        InvalidInput: it is malformed, or its digests do not fit each other.
    """
    try:
        document = json.loads(data)
        kernel, initramfs = (_file(document[name]) for name in ("kernel", "initramfs"))
        texts = (document["digest"], document["kernel"]["release"], document["kernel"]["flavor"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(f"{where}: its config is malformed: {error}", reason="BAD_GUEST_IMAGE") from error
    if not all(isinstance(text, str) and len(text) < 200 and text.isprintable() for text in texts):
        raise InvalidInput(f"{where}: its config is malformed", reason="BAD_GUEST_IMAGE")
    if image_digest(kernel.sha256, initramfs.sha256) != document["digest"]:
        raise InvalidInput(f"{where}: its config's digests do not fit each other", reason="BAD_GUEST_IMAGE")
    return GuestConfig(digest=document["digest"], kernel=kernel, initramfs=initramfs)


def _file(value: Mapping[str, Any]) -> GuestFile:
    size, sha256 = value["size"], value["sha256"]
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= _MAX_FILE:
        raise ValueError(f"the size {size!r}")
    if not isinstance(sha256, str) or not _HEX.fullmatch(sha256):
        raise ValueError(f"the digest {str(sha256)[:80]!r}")
    return GuestFile(size=size, sha256=sha256)


def config_descriptor(image: GuestImage) -> tuple[Descriptor, bytes]:
    """The config of a built image, and what describes it."""
    data = image.manifest.read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return Descriptor(media_type=CONFIG, digest=digest, size=len(data)), data


def _plain(descriptor: Descriptor, *, title: str = "") -> dict[str, Any]:
    plain: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    }
    if title:
        plain["annotations"] = {"org.opencontainers.image.title": title}
    return plain


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
