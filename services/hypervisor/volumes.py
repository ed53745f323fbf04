"""Named volumes: disks that outlive the boxes that use them, one box at a time.

<volumes>/<name>/base.ext4    an empty file system of the volume's full length, never written to again
                 disk.qcow2   what boxes have written, above it

The box that uses a volume holds a flock(2) on `disk.qcow2`: the descriptor is QEMU's too, so the
kernel lets go of it when the machine is gone, however it went, and a restarted service need not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from services.common import process
from services.common.errors import AlreadyExists, InvalidInput, NotFound, WrongState
from services.common.paths import private_dir
from services.hypervisor import disks
from services.hypervisor.programs import Programs

DEFAULT_MIB = 10 * 1024
_MIN_MIB, _MAX_MIB = 64, 1 << 24
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_MIB = 1 << 20
_BASE, _LAYER = "base.ext4", "disk.qcow2"
_UNFINISHED = ".unfinished-"
# mke2fs writes only the tables of the file system, which takes well below a second.
_FORMAT_SECONDS = 120.0
_ADMIN_PATH = "/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A volume: its greatest length, what it takes of the host's disk in bytes, when it was made."""

    name: str
    size_mib: int
    used_bytes: int
    create_time: float

    @property
    def id(self) -> str:
        """Its name."""
        return self.name


class Volumes:
    """The volumes below one directory.

    Args:
        root: The directory, which exists.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    async def create(self, programs: Programs, name: str, size_mib: int) -> Volume:
        """Make a volume. The same name with the same size, or with 0 for any, gives the one that is there.

        Raises:
            InvalidInput: a bad name or size.
            AlreadyExists: it is there with another size.
            WrongState: mke2fs is not installed.
            Exhausted: the disk is full.
        """
        check_name(name)
        if size_mib and not _MIN_MIB <= size_mib <= _MAX_MIB:
            raise InvalidInput(
                f"volume {name}: size_mib is {size_mib}; it must be {_MIN_MIB} to {_MAX_MIB}",
                reason="BAD_SIZE",
                field="size_mib",
            )
        with contextlib.suppress(NotFound):
            return self._same(name, size_mib)
        fresh = self._root / f"{_UNFINISHED}{secrets.token_hex(8)}"
        private_dir(fresh)
        try:
            base = fresh / _BASE
            await self._format(base, size_mib or DEFAULT_MIB)
            fd = await disks.make_layer(programs, base.stat().st_size, fresh / _LAYER)
            os.fsync(fd)
            os.close(fd)
            try:
                fresh.rename(self._root / name)
            except OSError:  # somebody else was faster
                return self._same(name, size_mib)
        finally:
            await asyncio.to_thread(shutil.rmtree, fresh, ignore_errors=True)
        return self._get(name)

    async def _format(self, path: Path, size_mib: int) -> None:
        mke2fs = shutil.which("mke2fs") or shutil.which("mke2fs", path=_ADMIN_PATH)
        if mke2fs is None:
            raise WrongState(
                "mke2fs is not installed; run: sudo apt-get install -y e2fsprogs",
                reason="PROGRAM_MISSING",
                program="mke2fs",
            )
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        argv = [
            mke2fs,
            "-q",
            "-t",
            "ext4",
            "-m",
            "0",
            "-J",
            "size=16",
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1",
        ]
        with disks.filling(path.parent):
            await process.run([*argv, path, f"{size_mib}M"], seconds=_FORMAT_SECONDS)

    def _same(self, name: str, size_mib: int) -> Volume:
        volume = self._get(name)
        if size_mib not in (0, volume.size_mib):
            raise AlreadyExists(
                f"volume {name} exists with {volume.size_mib} MiB; use it as it is, or choose another name",
                reason="VOLUME_EXISTS",
                volume=name,
            )
        return volume

    def _get(self, name: str) -> Volume:
        directory = self._root / name
        try:
            base = (directory / _BASE).stat()
            used = sum((directory / part).stat().st_blocks * 512 for part in (_BASE, _LAYER))
        except FileNotFoundError:
            raise _missing(name) from None
        return Volume(name=name, size_mib=base.st_size // _MIB, used_bytes=used, create_time=base.st_mtime)

    def all(self) -> list[Volume]:
        """All volumes, by name."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for entry in sorted(os.listdir(self._root)):
                if not entry.startswith("."):
                    with contextlib.suppress(NotFound):  # just being removed
                        found.append(self._get(entry))
        return found

    def open(self, name: str) -> tuple[int, int]:
        """Descriptors of base and layer, the latter locked for as long as it is open anywhere.

        Raises:
            NotFound: there is no such volume.
            WrongState: a box uses it.
        """
        check_name(name)
        try:
            layer = os.open(self._root / name / _LAYER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise _missing(name) from None
        try:
            fcntl.flock(layer, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.open(self._root / name / _BASE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), layer
        except BlockingIOError:
            os.close(layer)
            raise in_use(name, "another box") from None
        except OSError:
            os.close(layer)
            raise _missing(name) from None

    def delete(self, name: str) -> None:
        """Remove a volume and all that is in it.

        Raises:
            NotFound: there is no such volume.
            WrongState: a box uses it.
        """
        base, layer = self.open(name)
        try:
            trash = self._root / f"{_UNFINISHED}{secrets.token_hex(8)}"
            (self._root / name).rename(trash)
        finally:
            os.close(base)
            os.close(layer)
        shutil.rmtree(trash, ignore_errors=True)

    def clean(self) -> None:
        """Remove what a service that died has left unfinished. Blocks."""
        for path in self._root.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)


def check_name(name: str) -> None:
    """Refuse what is no name of a volume.

    Raises:
        InvalidInput: it is not.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} is not a volume's name: 1 to 63 of a-z, 0-9 and '-', no '-' first", reason="BAD_VOLUME"
        )


def in_use(name: str, box: str) -> WrongState:
    """The error for a volume that `box` has."""
    return WrongState(
        f"volume {name} is used by {box}; stop that first (voidbox volume ls)",
        reason="VOLUME_IN_USE",
        volume=name,
        box=box,
    )


def _missing(name: str) -> NotFound:
    return NotFound(
        f"there is no volume {name!r}; make it: voidbox volume create {name}",
        reason="VOLUME_NOT_FOUND",
        volume=name,
    )
