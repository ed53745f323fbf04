"""The guest images of one cache: kernel, initramfs and what they were made from, by digest.

    <cache>/guest/<digest>/{vmlinux,initramfs.cpio,manifest.json}
    <cache>/guest/default -> <digest>

A directory appears by fsync and rename once it is whole; what a killed writer leaves is called
`build-…` and is removed by the next one. Writers hold `guest/lock`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import Corrupt, InvalidInput, NotFound, VoidboxError
from services.imager.debian import sync, sync_tree

# Images kept besides the default one: boxes that are about to start may still name them.
_KEPT = 4
SCRATCH = "build-"
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """One built image.

    Attributes:
        digest: "sha256:" and 64 hex digits, over kernel and initramfs.
        directory: Holds the three files.
        release: The kernel's `uname -r`.
        flavor: "debian", "slim" or "file".
    """

    digest: str
    directory: Path
    release: str
    flavor: str

    @property
    def kernel(self) -> Path:
        """The uncompressed kernel."""
        return self.directory / "vmlinux"

    @property
    def initramfs(self) -> Path:
        """The root file system, an uncompressed cpio archive."""
        return self.directory / "initramfs.cpio"

    @property
    def manifest(self) -> Path:
        """What it was made from, as JSON."""
        return self.directory / "manifest.json"


def load_guest_image(cache: Path, name: str = "default") -> GuestImage:
    """The image called `name`: "default", or a digest with or without "sha256:".

    Raises:
        NotFound: there is none.
        Corrupt: its files are not as its manifest says.
    """
    plain = name.removeprefix("sha256:")
    if plain != "default" and not _HEX.fullmatch(plain):
        raise InvalidInput(f"{name!r} is not the digest of a guest image", reason="BAD_DIGEST")
    try:
        directory = (cache / "guest" / plain).resolve(strict=True)
        manifest = json.loads((directory / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise NotFound(
            f"there is no guest image {name} in {cache / 'guest'}; type `make guest` to build the default",
            reason="NO_GUEST_IMAGE",
        ) from error
    try:
        image = GuestImage(
            digest=manifest["digest"],
            directory=directory,
            release=manifest["kernel"]["release"],
            flavor=manifest["kernel"]["flavor"],
        )
        sizes = {image.kernel: manifest["kernel"]["size"], image.initramfs: manifest["initramfs"]["size"]}
        whole = all(path.stat().st_size == size for path, size in sizes.items())
    except (OSError, KeyError, TypeError) as error:
        raise Corrupt(
            f"{directory} is damaged; remove it and build again", reason="BAD_GUEST_IMAGE"
        ) from error
    if not whole or image.digest != f"sha256:{directory.name}":
        raise Corrupt(f"{directory} is damaged; remove it and build again", reason="BAD_GUEST_IMAGE")
    return image


def verify_guest_image(image: GuestImage) -> None:
    """Read the whole image and compare it with its digest.

    Raises:
        Corrupt: it is another content.
    """
    if image_digest(file_sha256(image.kernel), file_sha256(image.initramfs)) != image.digest:
        raise Corrupt(
            f"{image.directory} does not match its digest; remove it and build again",
            reason="BAD_GUEST_IMAGE",
        )


def guest_directories(cache: Path) -> list[Path]:
    """The directories of all guest images, whole or not, by digest."""
    home = cache / "guest"
    return sorted(path for path in home.glob("*") if _HEX.fullmatch(path.name)) if home.is_dir() else []


def sweep(home: Path) -> None:
    """Remove what a killed writer left in `guest`; nobody else writes while the caller holds the lock."""
    for path in home.glob(f"{SCRATCH}*"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, link or directory, as far as that is possible."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def settle(cache: Path, image: GuestImage, *, make_default: bool) -> None:
    """Mark `image` as just used, name it the default if wanted, and remove old ones."""
    home = cache / "guest"
    os.utime(image.directory)
    if make_default:
        link = home / f"{SCRATCH}default"
        link.unlink(missing_ok=True)
        link.symlink_to(image.directory.name)
        link.rename(home / "default")
    _prune(cache)


def take_over(cache: Path, scratch: Path, digest: str) -> GuestImage:
    """Give a finished directory its name, unless other inputs gave the same bytes before.

    Boxes may be starting from that one, so it is not replaced by its equal.
    """
    sync_tree(scratch)
    final = cache / "guest" / digest.removeprefix("sha256:")
    try:
        verify_guest_image(load_guest_image(cache, digest))
    except VoidboxError:
        if final.exists():
            shutil.rmtree(final)
        scratch.rename(final)
    sync(cache / "guest")
    return load_guest_image(cache, digest)


def _prune(cache: Path) -> None:
    """Remove all but the last few images, and what older builders kept."""
    home = cache / "guest"
    default = (home / "default").resolve()
    for path in _newest_first(path for path in guest_directories(cache) if path != default)[_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in _newest_first((home / "base").glob("*.cpio"))[2:]:
        path.unlink(missing_ok=True)
    for path in _newest_first((home / "inputs").glob("*"))[100:]:
        path.unlink(missing_ok=True)


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or its copy where that cannot be."""
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def file_sha256(path: Path) -> str:
    """Hex digits of a file's digest."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def image_digest(kernel_sha256: str, initramfs_sha256: str) -> str:
    """The digest of the guest image of these two files, whose hex digits are given."""
    text = f"voidbox guest image\nkernel sha256:{kernel_sha256}\ninitramfs sha256:{initramfs_sha256}\n"
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
