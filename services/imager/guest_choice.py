"""Which kernel and initramfs a box boots: what is named first wins, and nothing named is ever passed over."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.common.errors import InvalidInput, NotFound
from services.imager.guest_store import GuestImage, load_guest_image
from services.imager.reference import is_digest

_HEAD: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestChoice:
    """What to boot.

    Attributes:
        digest: `sha256:<hex>` of both files; "" for paths that somebody named.
        origin: "spec", "environment", "image" or "default".
        release: The kernel's `uname -r`, "" if not known.
    """

    kernel: Path
    initramfs: Path
    digest: str
    origin: str
    release: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A kernel and an initramfs by path; "" where none is named."""

    kernel: str
    initramfs: str


def choose_guest(
    cache: Path,
    *,
    spec: Wish,
    environment: Wish,
    guest_image: str,
    pull: Callable[[str], GuestImage],
) -> GuestChoice:
    """The paths of the spec, else of the environment, else the guest image named, else the default.

    A kernel without an initramfs gets the default guest image's, so it must have its drivers built
    in. Blocks; use a thread.

    Args:
        cache: The cache directory, which holds `guest/`.
        spec: `sandbox.kernel` and `sandbox.initramfs`.
        environment: `VOID_BOX_KERNEL` and `VOID_BOX_INITRAMFS`.
        guest_image: `sandbox.guest_image`: a digest, `default`, or a reference to a registry.
        pull: Brings the guest image that such a reference names.

    Raises:
        NotFound: what is named does not exist, or nothing is named and no default is built.
        InvalidInput: a path is relative, no regular file, or no kernel.
        Corrupt: a guest image is damaged.
        VoidboxError: what `pull` raises.
    """
    for origin, wish, names in (
        ("spec", spec, ("sandbox.kernel", "sandbox.initramfs")),
        ("environment", environment, ("VOID_BOX_KERNEL", "VOID_BOX_INITRAMFS")),
    ):
        if wish.kernel or wish.initramfs:
            return _by_path(cache, origin, wish, names)
    if guest_image and guest_image != "default":
        if is_digest(guest_image):
            return _by_name(cache, guest_image, "image")
        return _of(pull(guest_image), "image")
    return _by_name(cache, "default", "default")


def _by_name(cache: Path, name: str, origin: str) -> GuestChoice:
    return _of(load_guest_image(cache, name), origin)


def _of(image: GuestImage, origin: str) -> GuestChoice:
    return GuestChoice(
        kernel=image.kernel,
        initramfs=image.initramfs,
        digest=image.digest,
        origin=origin,
        release=image.release,
    )


def _by_path(cache: Path, origin: str, wish: Wish, names: tuple[str, str]) -> GuestChoice:
    if not wish.kernel:
        raise InvalidInput(
            f"{names[1]} is set and {names[0]} is not; an initramfs needs its kernel", reason="KERNEL_MISSING"
        )
    kernel = _checked(wish.kernel, names[0])
    _check_kernel(kernel, names[0])
    initramfs = _checked(wish.initramfs, names[1]) if wish.initramfs else load_guest_image(cache).initramfs
    return GuestChoice(kernel=kernel, initramfs=initramfs, digest="", origin=origin, release="")


def _checked(text: str, what: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise InvalidInput(f"{what}: {text!r} must be an absolute path", reason="BAD_PATH", path=text)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise NotFound(f"{what}: {text}: {why}; name an existing file, or leave it out", path=text) from error
    if not stat.S_ISREG(mode):
        raise InvalidInput(f"{what}: {text} is not a regular file", reason="BAD_PATH", path=text)
    if not os.access(path, os.R_OK):
        raise InvalidInput(
            f"{what}: {text} is not readable by uid {os.getuid()}", reason="BAD_PATH", path=text
        )
    return path


def _check_kernel(path: Path, what: str) -> None:
    """ELF (vmlinux), an x86 bzImage, or an arm64 Image; Documentation/arch of the kernel names the magics."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head[:4] == b"\x7fELF" or head[0x202:0x206] == b"HdrS" or head[0x38:0x3C] == b"ARM\x64":
        return
    raise InvalidInput(
        f"{what}: {path} is no Linux kernel (neither vmlinux, bzImage nor Image)",
        reason="NOT_A_KERNEL",
        path=path,
    )
