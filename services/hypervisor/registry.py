"""All boxes of one host: created once per id, found again after a restart, gone without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import (
    AlreadyExists,
    Cancelled,
    Exhausted,
    Internal,
    InvalidInput,
    NotFound,
    VoidboxError,
    WrongState,
)
from services.hypervisor import admission, adoption, bringup, prepare, record, volumes
from services.hypervisor.admission import Host
from services.hypervisor.box import DEFAULT_STOP_GRACE, Box
from services.hypervisor.change_meter import ChangeMeter
from services.hypervisor.changes import ChangeStore, overlays
from services.hypervisor.egress.settings import GatewaySettings
from services.hypervisor.identities import Identities
from services.hypervisor.launcher import DriverFactory, Launcher, Source
from services.hypervisor.layout import Layout
from services.hypervisor.model import BoxConfig, BoxRecord, check_box_id
from services.hypervisor.phases import Phases
from services.hypervisor.pidfd import host_boot_id, kill_now
from services.hypervisor.pool import Bounds
from services.hypervisor.probe import Prober
from services.hypervisor.qemu import QemuDriver
from services.hypervisor.reviews import Reviews
from services.hypervisor.states import BoxState
from services.hypervisor.volumes import Volume
from services.hypervisor.watch import Watchers

log = logging.getLogger(__name__)

DEFAULT_START_SECONDS = 120.0
MAX_FORKS = 64
STOPPED_BY_CALLER = "stopped on request"


@dataclass(slots=True)
class _Creation:
    """A start under way, and how many callers wait for it."""

    task: asyncio.Task[None]
    waiters: int = 0


class Registry:
    """The boxes. An async context manager: entering adopts or buries what an earlier service left.

    Leaving it lets the boxes run on; the next service, or `reap`, finds them.
    """

    def __init__(
        self,
        layout: Layout,
        prober: Prober,
        identities: Identities,
        *,
        memory_overcommit: float,
        parallel_starts: int,
        pool: Bounds,
        ready: int = 0,
        templates: bool = True,
        snapshots_mib: int = 16384,
        changes_mib: int = 10240,
        kept_changes_mib: int = 20480,
        gateway: GatewaySettings | None = None,
        driver: DriverFactory = QemuDriver,
    ) -> None:
        self._layout = layout
        self._prober = prober
        self._identities = identities
        self._overcommit = memory_overcommit
        self._driver = driver
        # Guests that boot all at once on few processors would all miss their time limits.
        self._starts = asyncio.Semaphore(parallel_starts)
        self._boxes: dict[str, Box] = {}
        self._creations: dict[str, _Creation] = {}
        self.launcher = Launcher(
            layout,
            prober,
            identities,
            driver,
            self._starts,
            bounds=pool,
            ready=ready,
            templates=templates,
            snapshots_mib=snapshots_mib,
            changes=ChangeStore(layout.changes, changes_mib << 20, kept_changes_mib << 20),
            gateway=gateway or GatewaySettings(),
            free_cid=self._free_cid,
            check_room=self._check_room,
            quiet=self._quiet,
        )
        self.reviews = Reviews(self.launcher.changes)
        self.meter = ChangeMeter(self.launcher.changes)
        self.watchers = Watchers()

    async def __aenter__(self) -> Registry:
        self._layout.make()
        await asyncio.to_thread(self._layout.empty_trash)
        waiting = await asyncio.to_thread(adoption.find, self._layout)
        await asyncio.to_thread(self.launcher.templates.clean)
        await asyncio.to_thread(self.launcher.snapshots.clean)
        await asyncio.to_thread(self.launcher.volumes.clean)
        found = [await asyncio.to_thread(self._read, box_id) for box_id in self._layout.box_ids()]
        records = sorted((each for each in found if each is not None), key=lambda each: each.create_time)
        for each in records:
            self._boxes[each.id] = Box(each, self._layout.box(each.id), self.watchers.changed)
        await self.launcher.changes.clean(self._boxes)
        async with asyncio.TaskGroup() as group:
            for box in self._boxes.values():
                if box.record.state.alive:
                    group.create_task(self._take_up(box))
        await self.launcher.take_up(waiting)
        return self

    def _read(self, box_id: str) -> BoxRecord | None:
        """The record of a box that had come up; what had not is removed. Blocks."""
        try:
            found = record.load(self._layout.box(box_id))
        except (OSError, VoidboxError) as error:
            log.warning("box %s cannot be read and is removed: %s", box_id, error)
            self._layout.remove(box_id)
            return None
        if found.state is BoxState.STARTING:
            log.warning("box %s had not come up when the service ended; it is removed", box_id)
            if found.host_boot_id == host_boot_id() and found.shim_pid:
                kill_now(found.shim_pid, found.shim_start)
            self._layout.remove(box_id)
            return None
        return found

    async def _take_up(self, box: Box) -> None:
        driver = self._driver(None)
        if box.record.host_boot_id != host_boot_id():
            await box.bury(driver, "the host has restarted")
            return
        try:
            if box.record.state is BoxState.STOPPING:
                raise Internal("it was being stopped")
            await bringup.adopt(box, driver)
            self.meter.watch(box)
            log.info("box %s goes on", box.id)
        except VoidboxError as error:
            log.warning("box %s is not taken up: %s", box.id, error.message)
            if box.record.shim_pid:
                await asyncio.to_thread(kill_now, box.record.shim_pid, box.record.shim_start)
            await box.bury(driver, f"it was lost while the hypervisor was down: {error.message}")

    async def __aexit__(self, *_: object) -> None:
        for creation in list(self._creations.values()):
            creation.task.cancel()
        await asyncio.gather(*(each.task for each in self._creations.values()), return_exceptions=True)
        for box in self._boxes.values():
            await box.let_go()
        await self.meter.close()
        await self.launcher.close()

    # Reading

    def get(self, box_id: str) -> Box:
        """The box with this id.

        Raises:
            NotFound: there is none.
        """
        box = self._boxes.get(check_box_id(box_id))
        if box is None:
            raise NotFound(f"there is no box {box_id!r}", reason="BOX_NOT_FOUND", box=box_id)
        return box

    def records(self, labels: Mapping[str, str]) -> list[BoxRecord]:
        """The boxes that have all of `labels`, oldest first."""
        return [
            box.record
            for box in self._boxes.values()
            if labels.items() <= dict(box.record.config.labels).items()
        ]

    def room(self) -> tuple[Host, admission.Room]:
        """The host and the room left on it; what is being ended gives its memory back within an instant."""
        host = Host.measure()
        back = sum(box.resident_mib() for box in self.launcher.leaving)
        host = dataclasses.replace(host, available_mib=min(host.memory_mib, host.available_mib + back))
        return host, admission.room(host, self._living(), self._overcommit)

    async def create_volume(self, name: str, size_mib: int) -> Volume:
        """Make a volume, or find the same one; see `Volumes.create`."""
        return await self.launcher.volumes.create(await self._prober.programs(), name, size_mib)

    def volume_users(self) -> dict[str, str]:
        """The boxes that use volumes, by the volume's name."""
        return {
            disk.volume: box.id
            for box in self._boxes.values()
            if box.record.state.alive
            for disk in box.record.config.disks
            if disk.volume
        }

    # Changing

    async def create(self, box_id: str, config: BoxConfig, start_seconds: float) -> BoxRecord:
        """Start a box and wait until its agent answers. Idempotent by id.

        Several callers may wait for one start; when the last of them goes away, it is undone.

        Raises:
            AlreadyExists: the id belongs to a box of another configuration.
            InvalidInput: the configuration is wrong.
            Exhausted: the host has no room.
            VoidboxError: it did not come up; nothing of it is left.
        """
        box_id = check_box_id(box_id) if box_id else f"box-{secrets.token_hex(5)}"
        if config.snapshot:
            config = await self._resolve(box_id, config)
        existing = self._boxes.get(box_id)
        if existing is None:
            creation = self._admit(box_id, config, start_seconds)
        elif (existing.record.asked or existing.record.config) != config:
            raise AlreadyExists(
                f"box {box_id} exists with another configuration; choose another id or delete it first",
                reason="BOX_EXISTS",
                box=box_id,
            )
        elif box_id in self._creations:
            creation = self._creations[box_id]
        else:
            return existing.record
        box = self._boxes[box_id]
        await self._join(creation)
        return box.record

    async def _resolve(self, box_id: str, config: BoxConfig) -> BoxConfig:
        """`config` with what its snapshot says; of a box that exists, also if the snapshot is gone."""
        try:
            return await self.launcher.snapshots.resolve(config)
        except NotFound:
            existing = self._boxes.get(box_id)
            if existing is None or existing.record.config.snapshot != config.snapshot:
                raise
            return existing.record.config

    def _admit(
        self, box_id: str, config: BoxConfig, start_seconds: float, source: Source | None = None
    ) -> _Creation:
        """Reserve the id and the memory; no other call comes between check and reservation."""
        self._check_room(config)
        users = self.volume_users()
        for disk in config.disks:
            if disk.volume in users:
                raise volumes.in_use(disk.volume, users[disk.volume])
        admission.check_disk(self._layout.boxes)
        self.launcher.changes.check_free(box_id, config)
        fresh = BoxRecord(
            id=box_id,
            config=config,
            create_time=time.time(),
            cid=self._free_cid(),
            host_boot_id=host_boot_id(),
        )
        box = Box(fresh, self._layout.box(box_id), self.watchers.changed)
        task = asyncio.create_task(self._create(box, start_seconds, source), name=f"create {box_id}")
        self._boxes[box_id] = box
        self._creations[box_id] = creation = _Creation(task)
        task.add_done_callback(lambda _: self._creations.pop(box_id, None))
        return creation

    async def _join(self, creation: _Creation) -> None:
        creation.waiters += 1
        try:
            await asyncio.shield(creation.task)
        except asyncio.CancelledError:
            if creation.task.cancelled():
                raise Cancelled("the box was stopped while it was starting", reason="BOX_STOPPED") from None
            if creation.waiters == 1:
                creation.task.cancel()
                await asyncio.gather(creation.task, return_exceptions=True)
            raise
        finally:
            creation.waiters -= 1

    async def _create(self, box: Box, start_seconds: float, source: Source | None) -> None:
        try:
            phases = Phases()
            async with self._starts:
                phases.add("queue")
                await self.launcher.start(box, start_seconds, phases, source)
            self.meter.watch(box)
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError)
            await box.destroy("stopped while it was starting" if stopped else str(error))
            await asyncio.to_thread(self._layout.remove, box.id)
            await self.launcher.changes.remove(box.id)
            del self._boxes[box.id]
            self.watchers.deleted(box.record)
            if isinstance(error, OSError):
                raise record.full_disk(error, self._layout.boxes) from error
            raise

    def _free_cid(self) -> int:
        taken = {box.record.cid for box in (*self._boxes.values(), *self.launcher.machines.values())}
        return prepare.choose_cid(taken, self._identities)

    def _check_room(self, config: BoxConfig, *, waits: bool = False) -> None:
        """Refuse what the host has no room for; machines that only wait make room, but not for their like.

        Raises:
            InvalidInput: this host can never give that.
            Exhausted: it cannot give that now.
        """
        prepare.check_config(config)
        host, left = self.room()
        admission.check_resources(config.resources, host)
        try:
            admission.check_room(config.resources, host, left, self._overcommit)
        except Exhausted:
            if waits or not self.launcher.clear_waiting():
                raise
            host, left = self.room()
            admission.check_room(config.resources, host, left, self._overcommit)

    def _living(self) -> list[tuple[BoxRecord, int]]:
        staying = (box for box in self.launcher.machines.values() if box not in self.launcher.leaving)
        return [
            (box.record, box.resident_mib())
            for box in (*self._boxes.values(), *staying)
            if box.record.state.alive
        ]

    async def _quiet(self) -> None:
        """Return when no box is being started."""
        while self._creations:
            await asyncio.wait([each.task for each in self._creations.values()])

    async def fork(
        self, box_id: str, fork_ids: Sequence[str], *, allow_secrets: bool
    ) -> tuple[list[BoxRecord], float]:
        """Make copies of a running box, all of them or none; also how long it stood still, in seconds.

        Raises:
            NotFound: there is no such box.
            AlreadyExists: an id is taken.
            InvalidInput: there are no ids, or one twice.
            WrongState: it holds secrets and that was not allowed, or it cannot be saved.
            Exhausted: the host has no room.
        """
        box = self.get(box_id)
        ids = [check_box_id(each) for each in fork_ids]
        if not 0 < len(set(ids)) == len(ids) <= MAX_FORKS:
            raise InvalidInput(f"fork_ids must be 1 to {MAX_FORKS} different ids", reason="BAD_FORK_IDS")
        for each in ids:
            if each in self._boxes:
                raise AlreadyExists(f"box {each} exists; choose another id", reason="BOX_EXISTS", box=each)
        # A copy is nobody's: whoever looks after boxes with these labels has not asked for it.
        config = dataclasses.replace(box.record.config, hostname="", snapshot="", labels={})
        async with self.launcher.captured(box, allow_secrets=allow_secrets) as (source, pause):
            made: list[str] = []
            try:
                creations = []
                for each in ids:
                    creations.append(self._admit(each, config, DEFAULT_START_SECONDS, source))
                    made.append(each)
                async with asyncio.TaskGroup() as group:
                    for creation in creations:
                        group.create_task(self._join(creation))
            except BaseException as error:
                for each in made:
                    await self.delete(each, force=True)
                if isinstance(error, BaseExceptionGroup):
                    raise error.exceptions[0] from error
                raise
        return [self._boxes[each].record for each in ids], pause

    async def stop(self, box_id: str, grace: float = DEFAULT_STOP_GRACE) -> BoxRecord:
        """End a box. Idempotent.

        Raises:
            NotFound: there is no such box.
        """
        box = self.get(box_id)
        if not await self._abandon(box):
            await box.stop(grace, STOPPED_BY_CALLER)
        return box.record

    async def _abandon(self, box: Box) -> bool:
        """Undo a start that is under way; whether there was one."""
        creation = self._creations.get(box.id)
        if creation is None or self._boxes.get(box.id) is not box:
            return False
        creation.task.cancel()
        await asyncio.gather(creation.task, return_exceptions=True)
        return box.id not in self._boxes

    async def delete(self, box_id: str, *, force: bool) -> None:
        """Remove a box with all its files, ending it first. Idempotent.

        Raises:
            Unavailable: its processes do not end.
        """
        box = self._boxes.get(check_box_id(box_id))
        if box is None or await self._abandon(box):
            return
        # What a volume's next box will read must be on it; everything else is thrown away.
        keeps = any(disk.volume for disk in box.record.config.disks)
        await box.stop(DEFAULT_STOP_GRACE if keeps or not force else 0.0, STOPPED_BY_CALLER)
        if self._boxes.get(box_id) is not box:  # another caller was faster
            return
        await box.let_go()
        await asyncio.to_thread(self._layout.remove, box_id)
        if overlays(box.record.config):
            await self.launcher.changes.end(box_id)
        if self._boxes.get(box_id) is box:
            del self._boxes[box_id]
            self.watchers.deleted(box.record)

    async def delete_changes(self, box_id: str) -> None:
        """Throw away what a box that is gone has changed in overlays. Idempotent.

        Raises:
            WrongState: the box exists.
        """
        if check_box_id(box_id) in self._boxes:
            raise WrongState(
                f"box {box_id} still exists, and its changes go with it: voidbox box rm {box_id}",
                reason="BOX_EXISTS",
                box=box_id,
            )
        await self.launcher.changes.remove(box_id)

    def watch(self, box_id: str) -> AsyncIterator[tuple[BoxRecord, bool]]:
        """Yield (box, whether it was deleted): the present boxes, then each change.

        Raises:
            NotFound: one box is asked for, and there is none of that id.
        """
        present: Iterable[Box] = [self.get(box_id)] if box_id else self._boxes.values()
        return self.watchers.follow([box.record for box in present], box_id)


def reap(state: Path) -> list[str]:
    """End and remove all boxes below a state directory that no service holds. Blocks.

    Returns:
        The ids of the boxes that still had processes.

    Raises:
        WrongState: a service holds them.
        Internal: processes do not end.
    """
    layout = Layout(state)
    killed: list[str] = []
    if not layout.root.exists():
        return killed
    with layout.locked():
        for box_id in layout.box_ids():
            found = None
            with contextlib.suppress(OSError, VoidboxError):
                found = record.load(layout.box(box_id))
            if found and found.shim_pid and found.host_boot_id == host_boot_id() and found.state.alive:
                if not kill_now(found.shim_pid, found.shim_start):
                    raise Internal(f"box {box_id}: process {found.shim_pid} does not end", reason="STUCK")
                killed.append(box_id)
            layout.remove(box_id)
        adoption.end_all(layout)
        layout.empty_trash()
    return killed
