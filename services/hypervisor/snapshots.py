"""Snapshots: boxes that were saved while they ran, by name, for others to start from."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import AlreadyExists, Exhausted, InvalidInput, NotFound, VoidboxError, WrongState
from services.hypervisor import record, saved
from services.hypervisor.layout import Layout
from services.hypervisor.model import BoxConfig, Resources
from services.hypervisor.saved import Manifest, Saved

log = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SECRET_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot as it is listed. Times are seconds since the epoch; `id` is its name."""

    id: str
    box_id: str
    create_time: float
    size_bytes: int
    digest: str
    has_secrets: bool
    resources: Resources


def holds_secrets(config: BoxConfig) -> bool:
    """Whether a box is known to hold secrets: it was said so, or a variable's name says so."""
    return config.holds_secrets or any(_SECRET_NAMES.search(name.upper()) for name in config.env)


def check_name(name: str) -> str:
    """`name` itself, which is then safe as a file name.

    Raises:
        InvalidInput: it is not 1 to 63 of [a-z0-9-].
    """
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"snapshot name {name!r} must be 1 to 63 of [a-z0-9-] and not start with '-'",
            reason="BAD_SNAPSHOT_NAME",
        )
    return name


class Snapshots:
    """All snapshots of a state directory.

    Args:
        layout: Where they are.
        limit_bytes: What they may take of the disk; those not used for longest make room.
    """

    def __init__(self, layout: Layout, limit_bytes: int) -> None:
        self._layout = layout
        self._limit = limit_bytes
        self._reserved: set[str] = set()

    def clean(self) -> None:
        """Remove what an interrupted write has left. Blocks."""
        for entry in list(os.scandir(self._layout.snapshots)):
            if entry.name.startswith("."):
                shutil.rmtree(entry.path, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._layout.snapshots / check_name(name)

    @contextlib.contextmanager
    def reserved(self, name: str) -> Any:
        """Keep a name that is free for the length of the block.

        Raises:
            AlreadyExists: it is taken.
        """
        if name in self._reserved or self._path(name).exists():
            raise AlreadyExists(
                f"there is a snapshot {name!r} already; remove it or choose another name",
                reason="SNAPSHOT_EXISTS",
                snapshot=name,
            )
        self._reserved.add(name)
        try:
            yield
        finally:
            self._reserved.discard(name)

    async def write(self, name: str, machine: Saved, disks: list[Path]) -> Snapshot:
        """Keep a saved machine under a reserved name.

        Raises:
            Exhausted: the disk is full, or it is larger than all may be together.
        """
        path = self._path(name)
        older = await asyncio.to_thread(self._of_box, str(machine.facts["box_id"]))
        bases = _bases(config_of(machine.facts))
        await asyncio.to_thread(saved.write, machine, path, disks, bases, older=older)
        try:
            await asyncio.to_thread(self._make_room, name)
            return await self.get(name)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
            raise

    def _make_room(self, new: str) -> None:
        mine = saved.disk_bytes(self._path(new))
        if mine > self._limit:
            raise Exhausted(
                f"snapshot {new} has {mine >> 20} MiB, all together may have {self._limit >> 20}; raise "
                "VOIDBOX_HYPERVISOR_SNAPSHOTS_MIB",
                reason="SNAPSHOT_TOO_LARGE",
            )
        older = sorted((path for path in self._paths() if path.name != new), key=_used)
        # What one shares with others stays, and counts for these then.
        while older and sum(map(saved.disk_bytes, (*older, self._path(new)))) > self._limit:
            path = older.pop(0)
            log.warning("snapshot %s is removed to make room for %s", path.name, new)
            shutil.rmtree(path, ignore_errors=True)

    def _of_box(self, box_id: str) -> list[Path]:
        """The snapshots of a box, the newest first."""
        found = []
        for path in self._paths():
            with contextlib.suppress(OSError, VoidboxError, KeyError):
                facts = saved.read_manifest(path).facts
                if facts["box_id"] == box_id:
                    found.append((float(facts["create_time"]), path))
        return [path for _, path in sorted(found, reverse=True)]

    def _paths(self) -> list[Path]:
        return [
            Path(entry.path) for entry in os.scandir(self._layout.snapshots) if NAME.fullmatch(entry.name)
        ]

    def _manifest(self, name: str) -> Manifest:
        try:
            return saved.read_manifest(self._path(name))
        except FileNotFoundError:
            raise NotFound(
                f"there is no snapshot {name!r}; list them: voidbox snapshot ls",
                reason="SNAPSHOT_NOT_FOUND",
                snapshot=name,
            ) from None

    async def get(self, name: str) -> Snapshot:
        """A snapshot.

        Raises:
            NotFound: there is none of this name.
            Corrupt: it is damaged.
        """
        return await asyncio.to_thread(self._get, name)

    def _get(self, name: str) -> Snapshot:
        manifest = self._manifest(name)
        facts = manifest.facts
        return Snapshot(
            id=name,
            box_id=facts["box_id"],
            create_time=facts["create_time"],
            size_bytes=saved.disk_bytes(self._path(name)),
            digest=f"sha256:{manifest.digest}",
            has_secrets=facts["has_secrets"],
            resources=config_of(facts).resources,
        )

    async def all(self) -> list[Snapshot]:
        """The snapshots, oldest first; those that are damaged are left out."""
        found = await asyncio.to_thread(self._all)
        return sorted(found, key=lambda each: (each.create_time, each.id))

    def _all(self) -> list[Snapshot]:
        found = []
        for path in self._paths():
            try:
                found.append(self._get(path.name))
            except (VoidboxError, OSError, KeyError) as error:
                log.warning("snapshot %s cannot be read: %s", path.name, error)
        return found

    async def delete(self, name: str) -> None:
        """Remove a snapshot; boxes that were made from it go on.

        Raises:
            NotFound: there is none of this name.
        """
        path = self._path(name)
        if not path.exists():
            await asyncio.to_thread(self._manifest, name)
        gone = path.with_name(f".{name}.gone")
        path.rename(gone)
        await asyncio.to_thread(shutil.rmtree, gone)

    async def load(self, name: str, host: dict[str, Any]) -> tuple[Saved, Path]:
        """A snapshot's machine, checked, and the directory of its disks; the caller closes it.

        Args:
            name: Its name.
            host: `templates.host_facts` of this host.

        Raises:
            NotFound: there is none of this name.
            Corrupt: it is damaged.
            WrongState: it was taken on another QEMU, accelerator or processor.
        """
        path = self._path(name)
        manifest = await asyncio.to_thread(self._manifest, name)
        theirs = manifest.facts["host"]
        different = [
            f"{key} {theirs.get(key)!r}, not {host[key]!r}" for key in host if theirs.get(key) != host[key]
        ]
        if different:
            raise WrongState(
                f"snapshot {name} cannot be restored here: it needs {'; '.join(different)}; take it again",
                reason="SNAPSHOT_INCOMPATIBLE",
                snapshot=name,
            )
        machine = await asyncio.to_thread(saved.read, path)
        with contextlib.suppress(OSError):
            os.utime(path / saved.MANIFEST)
        return machine, path

    async def resolve(self, config: BoxConfig) -> BoxConfig:
        """`config` of a box that starts from a snapshot, with what the snapshot says of it filled in.

        Raises:
            NotFound: there is no such snapshot.
            Corrupt: it is damaged.
            InvalidInput: the box asks for something else than the snapshot holds.
        """
        manifest = await asyncio.to_thread(self._manifest, config.snapshot)
        theirs = config_of(manifest.facts)
        name = config.snapshot
        if config.kernel_path:
            _same(
                name,
                "kernel",
                (config.kernel_path, config.initramfs_path),
                (theirs.kernel_path, theirs.initramfs_path),
            )
            for what in ("memory_mib", "vcpus"):
                _same(name, what, getattr(config.resources, what), getattr(theirs.resources, what))
        if config.kernel_path or config.root_disk or config.disks:
            _same(name, "root disk", config.root_disk, theirs.root_disk)
            _same(name, "disks", config.disks, theirs.disks)
        return dataclasses.replace(
            config,
            kernel_path=theirs.kernel_path,
            initramfs_path=theirs.initramfs_path,
            resources=theirs.resources,
            root_disk=theirs.root_disk,
            disks=theirs.disks,
            holds_secrets=config.holds_secrets or manifest.facts["has_secrets"],
        )


def _same(name: str, what: str, wanted: object, found: object) -> None:
    if wanted != found:
        raise InvalidInput(
            f"snapshot {name} has {what} {found}, but {wanted} is asked for; ask for the same",
            reason="SNAPSHOT_DIFFERS",
            snapshot=name,
        )


def _bases(config: BoxConfig) -> list[Path]:
    """The images below a box's disks."""
    return [
        Path(disk.base_path)
        for disk in (config.root_disk, *config.disks)
        if disk is not None and disk.base_path
    ]


def config_of(facts: dict[str, Any]) -> BoxConfig:
    """What the saved box was made of."""
    return record.config_from_plain(facts["config"])


def _used(path: Path) -> float:
    try:
        return (path / saved.MANIFEST).stat().st_mtime
    except OSError:
        return 0.0
