"""What is fuzzed in the imager: one function for each kind of input, each with one invariant.

`make fuzz` runs one with coverage guidance for as long as you like.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from services.common.errors import VoidboxError
from services.imager.docker_archive import DockerArchiveSource
from services.imager.files import ArchiveFiles
from services.imager.layout import LayoutSource
from services.imager.limits import Cancel, Limits
from services.imager.manifest import (
    Index,
    Platform,
    parse_config,
    parse_manifest,
    require_image,
    select_platform,
)
from services.imager.reference import (
    ArchiveReference,
    DockerArchiveReference,
    RegistryReference,
    parse_reference,
)
from services.imager.sources import resolve
from tests.imager_images import build_ext4, need

CORPUS = Path(__file__).parent / "corpus"
_LIMITS = Limits(unpacked_bytes=16 << 20, entries=2000)


def layers(data: bytes) -> None:
    """Any bytes as a layer are an image that e2fsck finds clean, or a clear refusal.

    The first byte says where the bytes are cut into two layers. Headers get their checksum right,
    so that what is behind it is reached.
    """
    tars = split_layers(data[:1] + _with_checksums(data[1:]))
    with tempfile.TemporaryDirectory(prefix="fuzz") as place:
        image = Path(place) / "image"
        try:
            build_ext4(image, tars, limits=_LIMITS)
        except VoidboxError:
            return
        done = subprocess.run(
            [need("e2fsck", "e2fsprogs"), "-fn", image],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def split_layers(data: bytes) -> list[bytes]:
    """The two layers in `data`, as its first byte says."""
    cut = 1 + (data[0] * len(data) // 256 if data else 0) // 512 * 512
    return [data[1:cut], data[cut:]]


def _with_checksums(data: bytes) -> bytes:
    fixed = bytearray(data)
    for at in range(0, len(fixed) - 511, 512):
        if fixed[at + 257 : at + 262] == b"ustar":
            fixed[at + 148 : at + 156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % sum(fixed[at : at + 512])
    return bytes(fixed)


def manifests(data: bytes) -> None:
    """Any bytes are a manifest, an index or a configuration, or refused as the caller's fault."""
    for media_type in ("", "application/vnd.oci.image.manifest.v1+json"):
        try:
            parsed = parse_manifest(data, "fuzz", media_type=media_type)
            if isinstance(parsed, Index):
                select_platform(parsed, Platform(os="linux", architecture="amd64"), "fuzz")
            else:
                require_image(parsed, "fuzz")
        except VoidboxError:
            continue
    try:
        config = parse_config(data, "fuzz")
        assert all(text.encode() is not None for text in (*config.env, *config.entrypoint, config.user))
    except VoidboxError:
        return


def references(data: bytes) -> None:
    """Any text is a reference that normalises to itself and to safe URLs, or is refused."""
    try:
        reference = parse_reference(data.decode(errors="replace"))
    except VoidboxError:
        return
    assert parse_reference(str(reference)) == reference
    if isinstance(reference, RegistryReference):
        assert not {"..", ""} & set(reference.repository.split("/"))
        assert not set(f"{reference.host}/{reference.repository}") & set(" ?#%\\@\n\t")


class _Sink:
    """Counts the bytes of a blob, and is content with as many as its descriptor says."""

    def __init__(self, size: int) -> None:
        self.count, self._size = 0, size

    def write(self, data: bytes) -> None:
        """Count."""
        self.count += len(data)
        assert self.count <= self._size, "a member gives more than its size"

    def reset(self) -> None:
        """Begin again."""
        self.count = 0


def archives(data: bytes) -> None:
    """Any bytes as an archive hold an image whose layers can all be read, or are refused; nothing is left."""
    data = _with_checksums(data)
    with tempfile.TemporaryDirectory(prefix="fuzz") as place:
        path = Path(place) / "a.tar"
        path.write_bytes(data)
        sources: tuple[Callable[[], DockerArchiveSource | LayoutSource], ...] = (
            lambda: DockerArchiveSource(DockerArchiveReference(path=path), _files(path), _LIMITS, Cancel()),
            lambda: LayoutSource(
                ArchiveReference(path=path, tag=None, digest=None), _files(path), _LIMITS, Cancel()
            ),
        )
        for make in sources:
            try:
                with make() as source:
                    found = resolve(source, Platform(os="linux", architecture="amd64"), "fuzz", _LIMITS)
                    for layer in found.manifest.layers:
                        sink = _Sink(_LIMITS.unpacked_bytes)
                        source.fetch(layer, sink)
            except VoidboxError:
                continue
        assert [entry.name for entry in Path(place).iterdir()] == ["a.tar"]


def _files(path: Path) -> ArchiveFiles:
    return ArchiveFiles(path, path.parent, _LIMITS, Cancel())


TARGETS: dict[str, Callable[[bytes], None]] = {
    "layers": layers,
    "manifests": manifests,
    "references": references,
    "archives": archives,
}
