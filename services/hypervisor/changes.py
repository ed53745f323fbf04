"""What boxes have changed in the host directories that they see as overlays; it outlives them.

<state>/hypervisor/changes/<box id>/
    set.json          which directories these are changes of, and since when
    <mount>/upper     the overlay's upper directory: changed files as they are, marks for removed ones
    <mount>/work      the overlay's work directory
    <mount>/applied.json   what has been brought to the host directory

The host's kernel writes this as the box works, so that neither the end of a box nor that of this
service loses any of it, and no guest has to be asked. All of it is the guest's word nevertheless.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import AlreadyExists, NotFound, WrongState
from services.common.process import run
from services.hypervisor import beneath
from services.hypervisor.inputs import Identity
from services.hypervisor.model import BoxConfig, MountMode, check_box_id
from services.hypervisor.record import write_atomically

log = logging.getLogger(__name__)

_FILE, _APPLIED = "set.json", "applied.json"
_VERSION = 1
_TRASH = ".trash-"
# Removing a tree of a million files.
_REMOVE_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """One directory that a box saw as an overlay; `number` is the mount's in the box."""

    number: int
    host_path: str
    guest_path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeSet:
    """What one box has changed.

    `began_ns` is before the box could change anything, by the clock that files are stamped with.
    `used_bytes` is known once the box has ended.
    """

    id: str
    began_ns: int
    labels: Mapping[str, str]
    overlays: tuple[Overlay, ...]
    ended: bool = False
    used_bytes: int = 0

    @property
    def create_time(self) -> float:
        """Seconds since the epoch."""
        return self.began_ns / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """An overlay's directories, open: the host's own, and what was changed; and what was applied before.

    `applied` maps a path to (ctime_ns, inode) of the file that was put there.
    """

    overlay: Overlay
    lower: int
    upper: int
    began_ns: int
    applied: dict[bytes, tuple[int, int]]


class ChangeStore:
    """The changes of all boxes of a host.

    Args:
        root: The directory that holds them.
        limit_bytes: What one box may change.
        kept_bytes: What is kept of boxes that have ended; the oldest give way.
    """

    def __init__(self, root: Path, limit_bytes: int, kept_bytes: int) -> None:
        self._root = root
        self.limit_bytes = limit_bytes
        self._kept_bytes = kept_bytes

    def check_free(self, box_id: str, config: BoxConfig) -> None:
        """Refuse a box that would mix its changes with those of an earlier one.

        Raises:
            AlreadyExists: changes of an earlier box of that id are kept.
        """
        if overlays(config) and (self._root / box_id).exists():
            raise AlreadyExists(
                f"changes that an earlier box {box_id} has made are kept; look at them (voidbox diff "
                f"{box_id}), throw them away (voidbox discard {box_id}), or choose another id",
                reason="CHANGES_EXIST",
                box=box_id,
            )

    def open_layers(
        self,
        box_id: str,
        config: BoxConfig,
        fds: Sequence[int],
        machine: Identity,
        own: contextlib.ExitStack,
    ) -> tuple[tuple[int, int, int], ...]:
        """The overlays of a box that starts: descriptors of lower, upper and work directory each.

        Args:
            fds: The box's mounts, open, in order.
            machine: Who writes to them; the owner of each that is not root's.
            own: Closes the upper and work directories.
        """
        found = overlays(config)
        if not found:
            return ()
        directory = self._root / box_id
        if not directory.exists():
            self._make(directory, box_id, config, found)
        opened = []
        for each in found:
            lower = os.fstat(fds[each.number])
            place = directory / str(each.number)
            layers = []
            for name in ("upper", "work"):
                (place / name).mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = os.open(place / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                own.callback(os.close, fd)
                layers.append(fd)
            # What the box sees at the mount itself is the upper directory's owner and mode.
            if os.geteuid() == 0:
                os.fchown(layers[0], machine.uid, machine.gid)
            os.fchmod(layers[0], lower.st_mode & 0o7777)
            opened.append((fds[each.number], layers[0], layers[1]))
        return tuple(opened)

    def _make(self, directory: Path, box_id: str, config: BoxConfig, found: tuple[Overlay, ...]) -> None:
        directory.mkdir(mode=0o700)
        # Files are stamped by a coarse clock, but since Linux 6.13 finely after somebody has looked.
        directory.stat()
        directory.chmod(0o700)
        began = directory.stat().st_ctime_ns
        self._write(ChangeSet(id=box_id, began_ns=began, labels=dict(config.labels), overlays=found))

    def _write(self, changes: ChangeSet) -> None:
        document = dataclasses.asdict(changes) | {"version": _VERSION}
        write_atomically(self._root / changes.id / _FILE, json.dumps(document).encode())

    def get(self, box_id: str) -> ChangeSet:
        """The changes of a box.

        Raises:
            NotFound: it has none.
        """
        check_box_id(box_id)
        try:
            document = json.loads((self._root / box_id / _FILE).read_bytes())
            if document.pop("version") != _VERSION:
                raise ValueError("version")
            document["overlays"] = tuple(Overlay(**each) for each in document["overlays"])
            return ChangeSet(**document)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("the changes of box %s cannot be read: %s", box_id, error)
            raise NotFound(
                f"no changes of a box {box_id!r} are kept", reason="NO_CHANGES", box=box_id
            ) from error

    def all(self, labels: Mapping[str, str] | None = None) -> list[ChangeSet]:
        """All that is kept, oldest first; only what has `labels`."""
        found = []
        for name in self._names():
            with contextlib.suppress(NotFound):
                found.append(self.get(name))
        wanted = dict(labels or {}).items()
        return sorted(
            (each for each in found if wanted <= dict(each.labels).items()), key=lambda each: each.began_ns
        )

    def _names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return [name for name in os.listdir(self._root) if not name.startswith(".")]
        return []

    @contextlib.contextmanager
    def opened(self, changes: ChangeSet, overlay: Overlay) -> Iterator[Layers]:
        """The directories of one overlay, to compare them.

        Raises:
            WrongState: the host's directory is gone.
        """
        place = self._root / changes.id / str(overlay.number)
        with contextlib.ExitStack() as stack:
            try:
                lower = os.open(overlay.host_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise WrongState(
                    f"{overlay.host_path}, which these are changes of: {error.strerror}",
                    reason="NO_DIRECTORY",
                    path=overlay.host_path,
                ) from error
            stack.callback(os.close, lower)
            upper = os.open(place / "upper", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, upper)
            applied: dict[bytes, tuple[int, int]] = {}
            with contextlib.suppress(OSError, ValueError):
                for path, (ctime, inode) in json.loads((place / _APPLIED).read_bytes()).items():
                    applied[os.fsencode(path)] = (ctime, inode)
            yield Layers(
                overlay=overlay, lower=lower, upper=upper, began_ns=changes.began_ns, applied=applied
            )

    def note_applied(self, changes: ChangeSet, layers: Layers) -> None:
        """Remember what was brought to the host directory."""
        document = {os.fsdecode(path): state for path, state in layers.applied.items()}
        place = self._root / changes.id / str(layers.overlay.number)
        write_atomically(place / _APPLIED, json.dumps(document).encode())

    def used_bytes(self, box_id: str) -> int:
        """What the changes of a box take of the disk, an entry 4 KiB or more. Blocks.

        Raises:
            OSError: they are nested too deep to be measured.
        """
        total = 0
        for place in (self._root / box_id).glob("*/upper"):
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                total += beneath.used_bytes(fd)
            finally:
                os.close(fd)
        return total

    async def end(self, box_id: str) -> None:
        """Keep the changes of a box that is gone, if there are any, and make room for them."""
        try:
            changes = self.get(box_id)
        except NotFound:
            await self.remove(box_id)
            return
        try:
            used = await asyncio.to_thread(self.used_bytes, box_id)
        except OSError:
            used = self.limit_bytes
        if not used:
            await self.remove(box_id)
            return
        for place in (self._root / box_id).glob("*/work"):
            await _remove_tree(place)
        self._write(dataclasses.replace(changes, ended=True, used_bytes=used))
        kept = [each for each in self.all() if each.ended]
        total = sum(each.used_bytes for each in kept)
        for each in kept:
            if total <= self._kept_bytes or each.id == box_id:
                break
            log.warning("the changes of box %s are removed to make room; they are the oldest", each.id)
            await self.remove(each.id)
            total -= each.used_bytes

    async def remove(self, box_id: str) -> None:
        """Throw the changes of a box away. Idempotent."""
        trash = self._root / f"{_TRASH}{box_id}"
        await _remove_tree(trash)
        with contextlib.suppress(FileNotFoundError):
            (self._root / box_id).rename(trash)
            await _remove_tree(trash)

    async def clean(self, box_ids: Collection[str]) -> None:
        """Finish what an earlier service has left; `box_ids` are the boxes that there are."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._root):
                if name.startswith("."):
                    await _remove_tree(self._root / name)
                elif name not in box_ids and not self._ended(name):
                    await self.end(name)

    def _ended(self, name: str) -> bool:
        with contextlib.suppress(NotFound):
            return self.get(name).ended
        return False


def overlays(config: BoxConfig) -> tuple[Overlay, ...]:
    """The overlays among the mounts of a box."""
    return tuple(
        Overlay(number=number, host_path=mount.host_path, guest_path=mount.guest_path)
        for number, mount in enumerate(config.mounts)
        if mount.mode is MountMode.OVERLAY
    )


async def _remove_tree(path: Path) -> None:
    """Remove a tree however deep it is and whatever modes its directories have."""
    if not path.exists():
        return
    # The overlay's own work directory has mode 0, and directories of a box may have any.
    await run([_program("chmod"), "-R", "u+rwX", "--", path], seconds=_REMOVE_SECONDS)
    await run([_program("rm"), "-rf", "--", path], seconds=_REMOVE_SECONDS)


def _program(name: str) -> str:
    return shutil.which(name) or name
