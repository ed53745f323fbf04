"""Brings machines up for boxes: from the pool, from a template, or by booting them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.common.errors import Exhausted, Internal, VoidboxError, WrongState
from services.hypervisor import adoption, bringup, disks, prepare, record, saved
from services.hypervisor.adoption import Waiting
from services.hypervisor.box import Box
from services.hypervisor.changes import ChangeStore
from services.hypervisor.claim import Identity
from services.hypervisor.driver import Driver, MachinePlan, NotRestored
from services.hypervisor.egress.credential import Interceptions
from services.hypervisor.egress.settings import GatewaySettings
from services.hypervisor.identities import Identities
from services.hypervisor.layout import Layout
from services.hypervisor.model import Accelerator, BoxConfig, BoxRecord, Transport
from services.hypervisor.phases import Phases
from services.hypervisor.pidfd import host_boot_id
from services.hypervisor.pool import Bounds, Pool
from services.hypervisor.probe import Prober
from services.hypervisor.programs import Programs
from services.hypervisor.saved import Saved
from services.hypervisor.snapshots import Snapshot, Snapshots, holds_secrets
from services.hypervisor.templates import Key, Template, Templates, host_facts, make_key
from services.hypervisor.volumes import Volumes

log = logging.getLogger(__name__)

# A restored machine answers within a second under emulation; one for the pool has no caller who waits.
POOL_SECONDS = 60.0

DriverFactory = Callable[[Programs | None], Driver]
"""Makes a driver; without programs it only has to adopt."""


class CheckRoom(Protocol):
    """Raises if the host has no room; `waits` tells whether it is for a machine that is no box yet."""

    def __call__(self, config: BoxConfig, *, waits: bool = False) -> None:
        """See the class."""
        ...


class Launcher:
    """Starts the machines of boxes, and those that are no boxes: templates' and the pool's.

    `machines` are the latter, by name; each has a directory below `Layout.machines`.
    """

    def __init__(
        self,
        layout: Layout,
        prober: Prober,
        identities: Identities,
        driver: DriverFactory,
        starts: asyncio.Semaphore,
        *,
        bounds: Bounds,
        ready: int,
        templates: bool,
        snapshots_mib: int,
        changes: ChangeStore,
        gateway: GatewaySettings,
        free_cid: Callable[[], int],
        check_room: CheckRoom,
        quiet: Callable[[], Awaitable[None]],
    ) -> None:
        self._layout = layout
        self._prober = prober
        self._identities = identities
        self._driver = driver
        self._starts = starts
        self._by_template = templates
        self._gateway = gateway
        self._free_cid = free_cid
        self._check_room = check_room
        self.machines: dict[str, Box] = {}
        # Those of them that are being ended, or are a box's already: its room is theirs.
        self.leaving: set[Box] = set()
        # What machines that were started ahead are to be restored from.
        self._origins: dict[str, Saved] = {}
        self.templates = Templates(layout)
        self.snapshots = Snapshots(layout, snapshots_mib << 20)
        self.volumes = Volumes(layout.volumes)
        self.changes = changes
        self.pool = Pool(bounds, make=self._make_pooled, end=self._end, quiet=quiet)
        self.ready = Pool(
            dataclasses.replace(bounds, size=ready), make=self._make_ready, end=self._end, quiet=quiet
        )

    async def close(self) -> None:
        """End the machines that wait and let go of the templates."""
        await self.pool.close()
        await self.ready.close()
        await self.templates.close()

    async def start(self, box: Box, seconds: float, phases: Phases, source: Source | None = None) -> None:
        """Bring a box up, in the directory that is to be its; from `source` if it is a fork.

        Raises:
            VoidboxError: it did not come up; call `Box.destroy` and remove the directory.
        """
        config = box.record.config
        deadline = time.monotonic() + seconds
        found = await self._prober.programs()
        accelerator = await self._prober.accelerator(config.kernel_path, config.accelerator)
        self._layout.make()
        launch = _Launch(
            box, deadline, phases, found, self._driver(found), accelerator, self._prober.transport()
        )
        if source is not None:
            await self._run_saved(launch, source.copy())
            return
        if (not self._by_template or config.cold_boot) and not config.snapshot:
            self._begin(launch, "boot")
            await self._run(launch, None)
            return
        if config.snapshot:
            machine, layers = await self.snapshots.load(config.snapshot, host_facts(found, accelerator))
            await self._run_saved(launch, Source(machine, layers, "snapshot"))
            return
        key = await self._key(config, found, accelerator)
        # Who a machine is decides what it may read of a mount, and the pool's are somebody already.
        pooled = None if config.mounts else self.pool.take(key.id)
        if pooled is None or not await self._run_taken(launch, pooled, "pool"):
            await self._run_restored(launch, key)
        self._want(key, config)

    def _want(self, key: Key, config: BoxConfig) -> None:
        self.pool.want(key, config)
        self.ready.want(key, config)

    def clear_waiting(self) -> list[Box]:
        """End all machines that wait, to make room; returns them."""
        return [*self.pool.clear(), *self.ready.clear()]

    def _begin(self, launch: _Launch, origin: str) -> None:
        launch.box.directory.mkdir(mode=0o700)
        launch.box.begin(accelerator=launch.accelerator, transport=launch.transport, origin=origin)

    async def _run_saved(self, launch: _Launch, source: Source) -> None:
        """Restore a box that was saved while it ran; closes `source`."""
        box = launch.box
        try:
            self._begin(launch, source.origin)
            if source.origin == "snapshot":
                await asyncio.to_thread(saved.copy_disks, source.layers, box.directory)
            else:
                await asyncio.to_thread(disks.clone_all, source.layers, box.directory)
            launch.phases.add("disks")
            await self._run(launch, source.machine, layered=True)
        finally:
            source.machine.close()

    async def _run_restored(self, launch: _Launch, key: Key) -> None:
        box = launch.box
        ready = None if box.record.config.mounts else self.ready.take(key.id)
        if ready is not None and await self._run_taken(launch, ready, "template", self._origins[ready.id]):
            return
        self._begin(launch, "template")
        template = await self.templates.get(key, functools.partial(self._boot_into, launch))
        try:
            with contextlib.closing(template):
                await self._run(launch, template)
        except NotRestored as error:
            log.warning("template %s is removed: %s", key.id, error.message)
            await self.templates.discard(key.id)
            self._forget(key.id)
            await asyncio.to_thread(self._layout.clear_disks, box.directory)
            await box.begin_again()
            await self._run(launch, None)

    async def _run_taken(
        self, launch: _Launch, taken: Box, origin: str, machine: Saved | None = None
    ) -> bool:
        """Whether the box got the machine; if not, it died at that moment and nothing of it is left.

        `machine` is what one that was only started is restored from.
        """
        box = launch.box
        self.leaving.add(taken)
        try:
            taken.directory.rename(box.directory)
            adoption.take_note(box.directory)
            box.begin(accelerator=launch.accelerator, transport=launch.transport, origin=origin)
            await self._run(launch, machine, taken)
        except VoidboxError as error:
            if box.runs or taken.runs:
                raise
            log.warning("box %s: the machine that waited for it has died: %s", box.id, error.message)
            await box.begin_again()
            await asyncio.to_thread(shutil.rmtree, box.directory)
            return False
        finally:
            await self._end(taken)
        return True

    async def _run(
        self,
        launch: _Launch,
        machine: Saved | None,
        pooled: Box | None = None,
        *,
        layered: bool = False,
    ) -> None:
        box, phases = launch.box, launch.phases
        cid = (pooled or box).record.cid
        with contextlib.ExitStack() as stack:
            plan, user = await prepare.prepare(
                box.id,
                box.record.config,
                box.directory,
                programs=launch.programs,
                accelerator=launch.accelerator,
                transport=launch.transport,
                cid=cid,
                fallback=self._identities.of(cid),
                volumes=self.volumes,
                changes=self.changes,
                stack=stack,
                boots=machine is None and pooled is None,
                layered=layered,
                saved=machine,
                note=phases.add,
                gateway=self._gateway,
            )
            phases.add("prepare")
            identity = _identity(box.id, box.record.config, user)
            await bringup.start(box, launch.driver, plan, identity, launch.left(), phases, pooled)

    async def _key(self, config: BoxConfig, found: Programs, accelerator: Accelerator) -> Key:
        return await asyncio.to_thread(make_key, config, found, accelerator, self.templates.digests)

    async def _boot_into(self, launch: _Launch, into: Saved) -> None:
        """Boot and save the machine that the box and its like are restored from, in the box's place."""
        box = launch.box
        with contextlib.ExitStack() as stack:
            plan = await prepare.prepare_template(
                box.id,
                box.record.config,
                box.directory,
                accelerator=launch.accelerator,
                transport=launch.transport,
                cid=box.record.cid,
                identity=self._identities.of(box.record.cid),
                into=into,
                stack=stack,
                note=lambda name: launch.phases.add(f"template-{name}"),
            )
            await bringup.boot_into(box, launch.driver, plan, into, launch.left())

    # Machines that are no boxes

    async def build_template(self, config: BoxConfig, seconds: float) -> Template:
        """Make sure that there is a template for boxes like `config`.

        Raises:
            InvalidInput: the configuration is wrong.
            Exhausted: the host has no room.
            VoidboxError: it did not come up.
        """
        deadline = time.monotonic() + seconds
        found = await self._prober.programs()
        accelerator = await self._prober.accelerator(config.kernel_path, config.accelerator)
        self._layout.make()
        key = await self._key(config, found, accelerator)

        async def build(into: Saved) -> None:
            async with self._starts:
                launch = self._launch("template", config, found, accelerator, deadline)
                try:
                    self._begin(launch, "boot")
                    await self._boot_into(launch, into)
                finally:
                    await self._end(launch.box)

        (await self.templates.get(key, build)).close()
        self._want(key, config)
        for each in await self.templates.all():
            if each.id == key.id:
                return each
        raise Internal(f"template {key.id} could not be written; see the hypervisor's log", reason="LOST")

    async def delete_template(self, template_id: str) -> None:
        """Remove a template and what waits of it; boxes that were made from it go on.

        Raises:
            NotFound: there is none.
        """
        await self.templates.delete(template_id)
        self._forget(template_id)

    def _forget(self, template_id: str) -> None:
        self.pool.forget(template_id)
        self.ready.forget(template_id)

    async def _make_pooled(self, key: Key, config: BoxConfig) -> Box:
        """A restored machine that waits for a box; see `_make_waiting`."""
        return await self._make_waiting("pool", key, config, bringup.wait_in_pool)

    async def _make_ready(self, key: Key, config: BoxConfig) -> Box:
        """A machine that was started and has nothing in it, for a box to be restored into."""
        return await self._make_waiting("ready", key, config, bringup.wait_ready)

    async def _make_waiting(
        self,
        kind: str,
        key: Key,
        config: BoxConfig,
        wait: Callable[[Box, Driver, MachinePlan, float], Awaitable[bytes | None]],
    ) -> Box:
        """A machine that waits for a box.

        Raises:
            Exhausted: there is no room for one.
            VoidboxError: it did not come up.
        """

        async def missing(_into: Saved) -> None:
            raise Internal(f"template {key.id} is gone", reason="LOST")

        found = await self._prober.programs()
        accelerator = await self._prober.accelerator(config.kernel_path, config.accelerator)
        bare = BoxConfig(
            kernel_path=config.kernel_path, initramfs_path=config.initramfs_path, resources=config.resources
        )
        template = await self.templates.get(key, missing)
        with contextlib.ExitStack() as stack:
            stack.callback(template.close)
            launch = self._launch(kind, bare, found, accelerator, time.monotonic() + POOL_SECONDS)
            box = launch.box
            try:
                self._begin(launch, "template")
                plan, _ = await prepare.prepare(
                    box.id,
                    bare,
                    box.directory,
                    programs=found,
                    accelerator=accelerator,
                    transport=launch.transport,
                    cid=box.record.cid,
                    fallback=self._identities.of(box.record.cid),
                    volumes=self.volumes,
                    changes=self.changes,
                    stack=stack,
                    boots=False,
                    saved=template,
                )
                self._origins[box.id] = template.copy()
                secret = await wait(box, launch.driver, plan, launch.left())
                if secret is not None:
                    adoption.note(box.directory, key.id, secret)
            except BaseException:
                await self._end(box)
                raise
        return box

    async def take_up(self, waiting: Sequence[Waiting]) -> None:
        """Put machines that an earlier service left in its pool into this one, as far as it has room."""
        driver = self._driver(None)
        for each in waiting:
            box = Box(each.record, each.directory, lambda _: None)
            self.machines[box.id] = box
            try:
                if not self.pool.has_room(each.template_id):
                    raise Exhausted("the pool is full", reason="POOL_FULL")
                await bringup.adopt_waiting(box, driver, each.secret)
            except VoidboxError as error:
                log.info("machine %s does not wait any longer: %s", box.id, error.message)
                await asyncio.to_thread(adoption.end, each.directory)
                await self._end(box)
            else:
                self.pool.put(each.template_id, box)

    # Boxes that run

    @contextlib.asynccontextmanager
    async def captured(self, box: Box, *, allow_secrets: bool) -> AsyncIterator[tuple[Source, float]]:
        """A running box as it is now, for the length of the block, and how long it stood still.

        Raises:
            WrongState: it holds secrets and that was not allowed, or it cannot be saved.
            VoidboxError: it could not be saved; it goes on.
        """
        config = box.record.config
        secret = holds_secrets(config)
        if secret and not allow_secrets:
            raise WrongState(
                f"box {box.id} holds secrets, and each copy would have them too; allow that "
                "with --allow-secrets",
                reason="HOLDS_SECRETS",
                box=box.id,
            )
        if held := [disk.volume for disk in config.disks if disk.volume]:
            raise WrongState(
                f"box {box.id} has volume {held[0]}, which only one box can have; a box with "
                "volumes cannot be saved or copied",
                reason="HAS_VOLUMES",
                box=box.id,
            )
        found = await self._prober.programs()
        staging = self._layout.machines / f"capture-{secrets.token_hex(5)}"
        machine = saved.empty(
            config.resources.memory_mib,
            {
                "host": host_facts(found, box.record.accelerator),
                "config": record.config_to_plain(dataclasses.replace(config, snapshot="", mounts=())),
                "box_id": box.id,
                "create_time": time.time(),
                "has_secrets": secret,
            },
        )
        try:
            await asyncio.to_thread(staging.mkdir, mode=0o700)
            pause = await box.capture(machine, staging)
            machine.seal()
            yield Source(machine, staging, "fork"), pause
        finally:
            machine.close()
            await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)

    async def snapshot(self, box: Box, name: str, *, allow_secrets: bool) -> tuple[Snapshot, float]:
        """Save a running box under a name; also how long it stood still, in seconds.

        Raises:
            AlreadyExists: the name is taken.
            WrongState: it holds secrets and that was not allowed, or it cannot be saved.
            Exhausted: the disk is full.
        """
        with self.snapshots.reserved(name):
            async with self.captured(box, allow_secrets=allow_secrets) as (source, pause):
                layers = await asyncio.to_thread(lambda: sorted(source.layers.iterdir()))
                return await self.snapshots.write(name, source.machine, layers), pause

    def _launch(
        self, kind: str, config: BoxConfig, found: Programs, accelerator: Accelerator, deadline: float
    ) -> _Launch:
        """A machine that is no box (yet); it counts for admission until `_end`.

        Raises:
            Exhausted: there is no room for it.
        """
        self._check_room(config, waits=kind != "template")
        name = f"{kind}-{secrets.token_hex(5)}"
        fresh = BoxRecord(
            id=name, config=config, create_time=time.time(), cid=self._free_cid(), host_boot_id=host_boot_id()
        )
        self.machines[name] = box = Box(fresh, self._layout.machines / name, lambda _: None)
        return _Launch(
            box, deadline, Phases(), found, self._driver(found), accelerator, self._prober.transport()
        )

    def _end(self, box: Box) -> Awaitable[None]:
        """End a machine that is no box, and remove all of it; from this call on it takes nobody's room."""
        self.leaving.add(box)
        return self._end_now(box)

    async def _end_now(self, box: Box) -> None:
        try:
            await box.destroy("it is not needed any more")
        except VoidboxError as error:
            log.error("machine %s: %s", box.id, error)
        await asyncio.to_thread(shutil.rmtree, box.directory, ignore_errors=True)
        self.machines.pop(box.id, None)
        self.leaving.discard(box)
        if (origin := self._origins.pop(box.id, None)) is not None:
            origin.close()


@dataclass(frozen=True, slots=True)
class Source:
    """A box that was saved: its machine, the directory of its disks' layers, and how it came about."""

    machine: Saved
    layers: Path
    origin: str

    def copy(self) -> Source:
        """The same, to be closed on its own."""
        return Source(self.machine.copy(), self.layers, self.origin)


@dataclass(frozen=True, slots=True)
class _Launch:
    """One machine on its way: what `_run` and its like need."""

    box: Box
    deadline: float
    phases: Phases
    programs: Programs
    driver: Driver
    accelerator: Accelerator
    transport: Transport

    def left(self) -> float:
        """Seconds until the caller gives up."""
        return max(0.1, self.deadline - time.monotonic())


def _identity(box_id: str, config: BoxConfig, user: tuple[int, int] | None) -> Identity:
    return Identity(
        box_id=box_id,
        hostname=config.hostname or box_id,
        user=user,
        root_serial=prepare.ROOT_SERIAL if config.root_disk else "",
        root_writable=bool(config.root_disk and config.root_disk.writable),
        # What the user gave counts: he may have reasons for certificates of his own.
        env={**Interceptions.from_json(config.interceptions).env(), **config.env},
        confinement=config.confinement,
    )
