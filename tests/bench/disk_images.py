"""The images that disks are measured with: a Debian base system, once and many times over.

They are made once and kept in `.build/bench`. Needs root and debootstrap for the base system; the
large image repeats it below other directories until it has 65,000 files, so that sizes of files
are distributed as in the small one. gzip's window is too short to notice the repetition. The large
image is in one layer, which is the hardest; the layered one has the same files, each repetition in
a layer of its own, as the steps of a Dockerfile make them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, cast

from tests.imager_images import need, run

KEPT: Final = Path(__file__).resolve().parents[2] / ".build/bench"
RELEASE: Final = "bookworm"
SMALL_FILES, LARGE_FILES = 6_000, 65_000
_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchImage:
    """An OCI layout with the tag `t`.

    Attributes:
        blobs: The layers, lowest first.
        entries: Tar members.
        unpacked_bytes: Of the tars.
    """

    name: str
    layout: Path
    blobs: tuple[Path, ...]
    entries: int
    unpacked_bytes: int


class _LayerFile:
    """A file object for `tarfile` that compresses and hashes what is written."""

    def __init__(self, file: BinaryIO, level: int) -> None:
        self._file = file
        self._gzip = zlib.compressobj(level, wbits=31)
        self.digest, self.diff_id = hashlib.sha256(), hashlib.sha256()
        self.count = 0

    def write(self, data: bytes) -> int:
        """As of any file."""
        self.diff_id.update(data)
        self.count += len(data)
        self._put(self._gzip.compress(data))
        return len(data)

    def close(self) -> None:
        """Write what the compressor holds back."""
        self._put(self._gzip.flush())

    def _put(self, data: bytes) -> None:
        self.digest.update(data)
        self._file.write(data)


def small_image() -> BenchImage:
    """A minimal Debian with Python: 200 MB in more than 6,000 files."""
    return _image("small", SMALL_FILES)


def large_image() -> BenchImage:
    """The same repeated: 1.5 GB in 72,000 files, in one layer."""
    return _image("large", LARGE_FILES)


def layered_image() -> BenchImage:
    """The files of the large image in seven layers."""
    return _image("layered", LARGE_FILES, layered=True)


Member = tuple[tarfile.TarInfo, BinaryIO | None]


def _image(name: str, files: int, *, layered: bool = False) -> BenchImage:
    layout = KEPT / name
    if not layout.exists():
        base = _base_system()
        with tarfile.open(base) as archive:
            copies = range(-(-files // len(archive.getmembers())))

        def members(copy: int) -> Iterator[Member]:
            with tarfile.open(base) as archive:
                for member in archive:
                    data = archive.extractfile(member) if member.isreg() else None
                    if copy:
                        member.name = f"./opt/copy{copy}/{member.name}"
                        if member.islnk():
                            member.linkname = f"./opt/copy{copy}/{member.linkname}"
                    member.mtime = int(member.mtime)
                    member.pax_headers = {
                        key: value for key, value in member.pax_headers.items() if "xattr" in key
                    }
                    yield member, data  # type: ignore[misc]

        each = [members(copy) for copy in copies]
        with tempfile.TemporaryDirectory(dir=KEPT) as scratch:
            write_layout(Path(scratch) / "layout", each if layered else [itertools.chain.from_iterable(each)])
            (Path(scratch) / "layout").rename(layout)
    return open_layout(name, layout)


def _base_system() -> Path:
    """The tar archive of what debootstrap makes, without what only installing left behind."""
    archive = KEPT / "base.tar"
    if archive.exists():
        return archive
    KEPT.mkdir(parents=True, exist_ok=True)
    query = ("Created-By: Packages", f"Codename: {RELEASE}", "Component: main")
    mirror = run("apt-get", "indextargets", "--format", "$(REPO_URI)", *query).split()[0]
    with tempfile.TemporaryDirectory(dir=KEPT) as scratch:
        tree, made = Path(scratch, "tree"), Path(scratch, "base.tar")
        program = need("debootstrap", "debootstrap")
        run(program, "--variant=minbase", "--include=python3,perl", RELEASE, tree, mirror)
        for place in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
            shutil.rmtree(tree / place, ignore_errors=True)
        run("tar", "--create", "--sort=name", f"--file={made}", f"--directory={tree}", ".")
        made.rename(archive)
    return archive


def write_layout(layout: Path, layers: Sequence[Iterator[Member]], level: int = 6) -> None:
    """An OCI layout of gzip layers, written as container engines write them: PAX, whole seconds."""
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    entries = unpacked = 0
    described, diff_ids = [], []
    for members in layers:
        made = blobs / "layer"
        with made.open("wb") as file:
            layer = _LayerFile(file, level)
            with tarfile.open(
                fileobj=cast("IO[bytes]", layer), mode="w|", format=tarfile.PAX_FORMAT
            ) as archive:
                for member, data in members:
                    archive.addfile(member, data)
                    archive.members.clear()  # type: ignore[attr-defined]
                    entries += 1
            layer.close()
        digest = layer.digest.hexdigest()
        made.rename(blobs / digest)
        size = (blobs / digest).stat().st_size
        described.append({"mediaType": _LAYER, "digest": f"sha256:{digest}", "size": size})
        diff_ids.append(f"sha256:{layer.diff_id.hexdigest()}")
        unpacked += layer.count

    def put(value: Any, media_type: str) -> dict[str, Any]:
        data = json.dumps(value).encode()
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}

    architecture = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    manifest_type = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": put(config, "application/vnd.oci.image.config.v1+json"),
        "layers": described,
    }
    tagged = put(manifest, manifest_type) | {"annotations": {"org.opencontainers.image.ref.name": "t"}}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [tagged]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "facts.json").write_text(json.dumps({"entries": entries, "unpacked_bytes": unpacked}))


def open_layout(name: str, layout: Path) -> BenchImage:
    """What `write_layout` made."""
    facts = json.loads((layout / "facts.json").read_text())
    blobs = layout / "blobs/sha256"
    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads((blobs / index["manifests"][0]["digest"].removeprefix("sha256:")).read_text())
    layers = tuple(blobs / layer["digest"].removeprefix("sha256:") for layer in manifest["layers"])
    return BenchImage(name=name, layout=layout, blobs=layers, **facts)
