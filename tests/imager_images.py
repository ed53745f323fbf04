"""Builds layers and OCI layouts for the imager's tests, and reads ext4 images by other people's code."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zstandard

from services.imager.ext4 import Ext4Writer, ImageSize
from services.imager.layers import LayerMerger, LayerSource
from services.imager.limits import Limits

_SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IN_CI = bool(os.environ.get("CI"))


def need(program: str, package: str) -> str:
    """The path of `program`; without it the test fails in CI and is skipped on a laptop."""
    found = shutil.which(program, path=_SBIN)
    if found is None:
        missing(f"{program} is not installed; type: apt-get install {package}")
    assert found is not None
    return found


def missing(why: str) -> None:
    """Fail in CI, skip elsewhere, saying why."""
    if IN_CI:
        pytest.fail(why)
    pytest.skip(why)


def run(*argv: str | Path, cwd: Path | None = None, ok: Sequence[int] = (0,)) -> str:
    """Run a program to its end; stdout and stderr."""
    done = subprocess.run(
        [str(word) for word in argv],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": _SBIN, "LC_ALL": "C.UTF-8", "HOME": os.environ.get("HOME", "/")},
        check=False,
    )
    text = done.stdout.decode(errors="backslashreplace")
    assert done.returncode in ok, f"{argv} exited with {done.returncode}:\n{text}"
    return text


@dataclass(frozen=True, kw_only=True)
class Item:
    """One tar member."""

    name: bytes
    kind: bytes = tarfile.REGTYPE
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 1_700_000_000_123_456_789
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)


def directory(name: bytes, **more: Any) -> Item:
    """A directory member."""
    return Item(**{"name": name, "kind": tarfile.DIRTYPE, "mode": 0o755, **more})


def symlink(name: bytes, target: bytes, **more: Any) -> Item:
    """A symbolic link member."""
    return Item(**{"name": name, "kind": tarfile.SYMTYPE, "link": target, "mode": 0o777, **more})


def hardlink(name: bytes, target: bytes) -> Item:
    """A hard link member."""
    return Item(name=name, kind=tarfile.LNKTYPE, link=target)


def make_tar(items: Sequence[Item], *, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar archive by Python's own writer: names that are not UTF-8 go in raw, as other writers do."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for item in items:
            info = tarfile.TarInfo(os.fsdecode(item.name))
            info.type, info.mode, info.uid, info.gid = item.kind, item.mode, item.uid, item.gid
            info.linkname = os.fsdecode(item.link)
            info.devmajor, info.devminor = item.device
            info.size = len(item.data) if item.kind == tarfile.REGTYPE else 0
            info.mtime = item.mtime_ns // 10**9
            if form == tarfile.PAX_FORMAT:
                headers: dict[str, str] = {}
                seconds, rest = divmod(item.mtime_ns, 10**9)
                if rest and seconds >= 0:
                    headers["mtime"] = f"{seconds}.{rest:09d}"
                for key, value in item.xattrs.items():
                    headers["SCHILY.xattr." + os.fsdecode(key)] = os.fsdecode(value)
                info.pax_headers = headers
            archive.addfile(info, io.BytesIO(item.data))
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    """`sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def build_ext4(
    path: Path,
    tars: Sequence[bytes],
    *,
    size_bytes: int | None = None,
    free_bytes: int = 0,
    limits: Limits | None = None,
) -> ImageSize:
    """An ext4 image of uncompressed layers at `path`."""
    with (
        path.open("w+b", buffering=1 << 20) as file,
        Ext4Writer(file, uuid=bytes(range(16)), hash_seed=bytes(range(16, 32))) as writer,
    ):
        merger = LayerMerger(writer, limits or Limits())
        for tar in tars:
            digest = sha256(tar)
            merger.apply(LayerSource(digest=digest, size=len(tar), diff_id=digest, blob=io.BytesIO(tar)))
        return writer.finish(merger.tree, size_bytes=size_bytes, free_bytes=free_bytes)


def check_ext4(path: Path) -> dict[str, str]:
    """e2fsck must be content and dumpe2fs must agree with itself; returns the superblock's fields."""
    out = run(need("e2fsck", "e2fsprogs"), "-fn", path)
    assert "clean" not in out or "WARNING" not in out, out
    text = run(need("dumpe2fs", "e2fsprogs"), path)
    fields = dict(re.findall(r"^([A-Z][A-Za-z #]+):\s+(.*)$", text, re.MULTILINE))
    assert fields["Filesystem state"] == "clean"
    free = [int(count) for count in re.findall(r"^  (\d+) free blocks", text, re.MULTILINE)]
    assert sum(free) == int(fields["Free blocks"])
    assert int(fields["Block count"]) * 4096 == path.stat().st_size
    return fields


@contextlib.contextmanager
def mounted(image: Path, where: Path) -> Iterator[Path]:
    """`image` mounted read-only; needs root and loop devices."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        missing("mounting an image needs root and loop devices")
    where.mkdir(exist_ok=True)
    run("mount", "-o", "loop,ro", image, where)
    try:
        yield where
    finally:
        run("umount", where)


def make_layout(
    path: Path,
    tars: Sequence[bytes],
    *,
    tag: str | None = "t",
    config: Mapping[str, Any] | None = None,
    compression: str = "gzip",
    architecture: str = "amd64",
) -> Path:
    """An OCI layout with one image, by this code alone."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def put(data: bytes, media_type: str) -> dict[str, Any]:
        digest = sha256(data)
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    suffix = "" if compression == "none" else f"+{compression}"
    layer_type = f"application/vnd.oci.image.layer.v1.tar{suffix}"
    layers = [put(compress(tar, compression), layer_type) for tar in tars]
    document = {
        "architecture": architecture,
        "os": "linux",
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [sha256(tar) for tar in tars]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(json.dumps(document).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": layers,
    }
    entry = put(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    if tag is not None:
        entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    index = {"schemaVersion": 2, "manifests": [entry]}
    (path / "index.json").write_text(json.dumps(index))
    return path


def compress(data: bytes, how: str) -> bytes:
    """`data` by gzip, zstd or not at all; always the same bytes."""
    if how == "gzip":
        return gzip.compress(data, 6, mtime=0)
    if how == "zstd":
        return zstandard.ZstdCompressor().compress(data)
    assert how == "none"
    return data
