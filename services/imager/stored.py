"""What the cache holds besides images: guest images, disks of agents and of directories."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import VoidboxError, WrongState
from services.imager.cache import ImageCache, hex_part, in_use
from services.imager.guest_store import SCRATCH, guest_directories, load_guest_image
from services.imager.limits import Cancel
from services.imager.lock import held

GUEST = "guest image"
AGENT = "agent disk"
DIRECTORY = "directory disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredContent:
    """One piece.

    Attributes:
        kind: `GUEST`, `AGENT` or `DIRECTORY`.
        name: What people call it.
        path: A directory of a guest image, else a file.
        size_bytes: What it occupies.
        use_time: Seconds since 1970.
        is_default: Whether it is the guest image of boxes that name none.
    """

    kind: str
    name: str
    digest: str
    path: Path
    size_bytes: int
    use_time: float
    is_default: bool = False


def stored_disks(cache: ImageCache) -> list[StoredContent]:
    """The disks of no image, the least recently used first. Blocks."""
    found = []
    for directory, kind in (("agents", AGENT), ("disks", DIRECTORY)):
        for key in cache.record_keys(directory):
            record = cache.read_record(directory, key) or {}
            if kind == DIRECTORY and "contents" not in record:
                continue
            name = f"{record.get('agent', '?')} {record.get('agent_version', '?')}" if kind == AGENT else ""
            path = cache.root / directory / f"{key}.ext4"
            with contextlib.suppress(FileNotFoundError):
                info = path.stat()
                found.append(
                    StoredContent(
                        kind=kind,
                        name=name or "-",
                        digest=f"sha256:{key}",
                        path=path,
                        size_bytes=info.st_blocks * 512,
                        use_time=info.st_mtime,
                    )
                )
    return sorted(found, key=lambda item: item.use_time)


def stored_guests(home: Path) -> list[StoredContent]:
    """The guest images of the cache directory `home`, the least recently used first. Blocks."""
    default = (home / "guest/default").resolve()
    found = []
    for directory in guest_directories(home):
        try:
            image = load_guest_image(home, directory.name)
            files = [path.stat() for path in (image.kernel, image.initramfs, image.manifest)]
            use_time = directory.stat().st_mtime
        except (VoidboxError, OSError):
            continue  # damaged, or going: `verify` tells
        found.append(
            StoredContent(
                kind=GUEST,
                name=f"kernel {image.release} ({image.flavor})",
                digest=image.digest,
                path=directory,
                size_bytes=sum(info.st_blocks * 512 for info in files),
                use_time=use_time,
                is_default=directory == default,
            )
        )
    return sorted(found, key=lambda item: item.use_time)


def remove_stored(cache: ImageCache, home: Path, digest: str, cancel: Cancel) -> int | None:
    """Remove the piece `digest`; the bytes freed, or None if there is none. Blocks.

    The caller holds the cache's `COLLECT_LOCK` alone.

    Raises:
        WrongState: a running box uses the disk, or it is the default guest image.
        Cancelled: the caller cancelled.
    """
    hex_part(digest)
    for item in (*stored_disks(cache), *stored_guests(home)):
        if item.digest != digest:
            continue
        if item.kind == GUEST:
            _remove_guest(item, home, cancel)
        elif in_use(item.path):
            raise WrongState(
                f"{digest} is a disk of a running box or of a snapshot; stop or remove it first: voidbox ps, "
                "voidbox snapshot ls",
                reason="IMAGE_IN_USE",
                path=item.path,
            )
        else:
            item.path.unlink(missing_ok=True)
            item.path.with_suffix(".json").unlink(missing_ok=True)
        return item.size_bytes
    return None


def _remove_guest(item: StoredContent, home: Path, cancel: Cancel) -> None:
    if item.is_default:
        raise WrongState(
            f"{item.digest} is the default guest image; make another one the default first: "
            "voidbox image build-guest",
            reason="DEFAULT_GUEST_IMAGE",
            path=item.path,
        )
    with held(home / "guest/lock", cancel):
        away = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=home / "guest"))
        with contextlib.suppress(FileNotFoundError):
            item.path.rename(away / item.path.name)
        shutil.rmtree(away, ignore_errors=True)
