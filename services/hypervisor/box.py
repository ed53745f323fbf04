"""One box: its machine, its guest, its record on disk, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from services.common.errors import Cancelled, TimedOut, Unavailable, VoidboxError, WrongState
from services.hypervisor import failure, record, stats
from services.hypervisor.activity import Activity
from services.hypervisor.claim import Guest
from services.hypervisor.driver import Driver, Machine
from services.hypervisor.failure import Remains
from services.hypervisor.layout import Layout
from services.hypervisor.model import Accelerator, BoxRecord, Transport
from services.hypervisor.network import BoxNetwork
from services.hypervisor.saved import Saved
from services.hypervisor.states import BoxState, move

log = logging.getLogger(__name__)

# A call that fails because the machine is ending: how long until that is known.
END_NOTICE_SECONDS = 2.0
# The guest's own limit for its programs at shutdown, at most half of the whole grace.
PROGRAM_GRACE_SECONDS = 2.0
DEFAULT_STOP_GRACE = 5.0

T = TypeVar("T")


class Box:
    """A box from its start to its end.

    All changes go through `update`, which writes the record to disk before anybody hears of it.
    `ended` is set once its processes are gone and its last state is on disk.
    """

    def __init__(self, initial: BoxRecord, directory: Path, on_change: Callable[[BoxRecord], None]) -> None:
        self.record = initial
        self.directory = directory
        self.ended = asyncio.Event()
        if not initial.state.alive:
            self.ended.set()
        self._on_change = on_change
        self.machine: Machine | None = None
        self.agent: Guest | None = None
        self.network = BoxNetwork(initial.id, directory)
        self._asked = ""
        self.operation = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lifetime: asyncio.TimerHandle | None = None
        self.activity = Activity(lambda: self.machine.cpu_seconds() if self.machine is not None else 0.0)

    @property
    def id(self) -> str:
        """The box's id."""
        return self.record.id

    def update(self, **changes: Any) -> None:
        """Change the record: on disk first, then for everybody.

        Raises:
            Exhausted: it cannot be saved, and the box is to live on.
        """
        changed = dataclasses.replace(self.record, **changes)
        if changed.state is not self.record.state:
            move(self.record.state, changed.state)
        try:
            record.save(self.directory, changed)
        except (OSError, VoidboxError) as error:
            if changed.state in (BoxState.STARTING, BoxState.RUNNING):
                raise
            # A full disk must not keep a box from ending; a restart finds it dead by itself.
            log.error("box %s: its state could not be saved: %s", self.id, error)
        self.record = changed
        self._on_change(changed)

    # Starting

    def begin(self, *, accelerator: Accelerator, transport: Transport, origin: str = "boot") -> None:
        """Write the first record, once the box's directory is there."""
        self.update(accelerator=accelerator, transport=transport, origin=origin)

    async def begin_again(self) -> None:
        """Forget a machine that did not start, so that another can in its place."""
        await self.let_go()
        self.machine = None
        Layout.clear_machine(self.directory)
        self.update(vmm_pid=0, shim_pid=0, shim_start=0, origin="boot")

    @property
    def runs(self) -> bool:
        """Whether it has a machine that has not ended."""
        return self.machine is not None and not self.machine.ended.is_set()

    def spawned(self, pid: int, started: int) -> None:
        """Note the machine's leading process before it does anything."""
        self.update(shim_pid=pid, shim_start=started)

    async def unless_ended(self, work: Coroutine[object, object, T]) -> T:
        """The result of `work` with the guest.

        Raises:
            VoidboxError: why the machine ended first.
        """
        machine = self.machine  # once it has ended, it is let go of
        if machine is None:
            work.close()
            raise await self._died() or self.wrong_state("running")
        task = asyncio.create_task(work)
        end = asyncio.create_task(machine.ended.wait())
        try:
            await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and task.exception() is not None and not isinstance(task.exception(), TimedOut):
                # The guest's sockets close a moment before its processes are gone.
                await asyncio.wait({end}, timeout=END_NOTICE_SECONDS)
            if not end.done() or (task.done() and task.exception() is None):
                return task.result()
            if self.record.ready_time and (died := await self._died()):
                raise died
            config = self.record.config
            raise failure.boot_failure(
                self.id, config.kernel_path, config.resources.memory_mib, machine.remains()
            )
        finally:
            for each in (task, end):
                each.cancel()
            await asyncio.gather(task, end, return_exceptions=True)

    # Taking up after a restart of the service

    async def bury(self, driver: Driver, why: str) -> None:
        """End what is left of a box that could not be adopted, and record how it ended."""
        if self.machine is not None:
            await self.machine.kill(gently=False)
        if not self.record.state.alive:
            return
        if self.record.state is BoxState.STOPPING:
            self.update(state=BoxState.STOPPED, end_time=time.time())
        else:
            remains = driver.leftovers(self.record, self.directory)
            reason = failure.describe_end(remains) if remains.recorded else why
            self.update(state=BoxState.FAILED, reason=reason, end_time=time.time())
        await self._finish()

    # Living

    def serve(self, machine: Machine) -> None:
        """Watch over a machine whose guest has answered, to the end of both."""
        self._own(self._follow(machine))
        self.restart_clocks()

    def _own(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _follow(self, machine: Machine) -> None:
        """Wait for the machine's end and record it."""
        await machine.ended.wait()
        if self.record.state.alive:
            self.update(end_time=time.time(), **self._ending(machine.remains()))
            log.info("box %s: %s: %s", self.id, self.record.state.value, self.record.reason)
        await self._finish()

    def _ending(self, remains: Remains) -> dict[str, Any]:
        if self._asked:
            return {"state": BoxState.STOPPED, "reason": self._asked}
        return {"state": BoxState.FAILED, "reason": failure.describe_end(remains)}

    async def _finish(self) -> None:
        self._stop_clocks()
        await self.network.end()
        self.ended.set()
        await self.let_go(cancel=False)

    async def let_go(self, *, cancel: bool = True) -> None:
        """Close our ends; a machine that runs goes on running. Idempotent.

        Args:
            cancel: Whether tasks of this box are ended too.
        """
        if cancel:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.agent is not None:
            guest, self.agent = self.agent, None
            # Calls that the end has cut off get time to end by themselves, so that they say why.
            await guest.channel.close(None if cancel else END_NOTICE_SECONDS)
        if cancel:
            await self.network.close()
        if self.machine is not None and (cancel or self.machine.ended.is_set()):
            machine, self.machine = self.machine, None
            await machine.close()

    def _expire(self, why: str) -> None:
        self._own(self.stop(DEFAULT_STOP_GRACE, why))

    def _stop_clocks(self) -> None:
        self.activity.clear()
        if self._lifetime is not None:
            self._lifetime.cancel()

    def restart_clocks(self) -> None:
        """Start to measure its life and its idleness, by the limits that it has now."""
        self._stop_clocks()
        config = self.record.config
        if config.max_lifetime:
            left = max(0.0, self.record.create_time + config.max_lifetime - time.time())
            why = f"its max_lifetime of {config.max_lifetime:g} s has passed"
            self._lifetime = asyncio.get_running_loop().call_later(left, self._expire, why)
        unused = f"nothing has used it for its idle_timeout of {config.idle_timeout:g} s"
        self.activity.limit(config.idle_timeout, lambda: self._expire(unused))
        self.activity.limit(config.auto_pause, lambda: self._own(self._pause_idle()))
        self.activity.rest()

    @contextlib.asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """Keep the box from counting as idle; one that was paused for being idle goes on first.

        Raises:
            VoidboxError: it does not go on.
        """
        self.activity.begin()
        try:
            if self.record.auto_paused:
                # Whoever goes away meanwhile must not leave it half awake.
                await asyncio.shield(self._own(self._wake()))
            yield
        finally:
            self.activity.end()

    async def _pause_idle(self) -> None:
        async with self.operation:
            machine = self.machine
            if self.activity.calls or self._asked or self.record.state is not BoxState.RUNNING or not machine:
                return
            try:
                # On disk first: a service that dies in between finds the machine paused by itself.
                self.update(auto_paused=True)
                await machine.pause()
            except VoidboxError as error:
                log.warning("box %s is idle but cannot be paused: %s", self.id, error.message)
                return
            if self.activity.calls:  # one came while the machine was being stopped
                await machine.resume()
                self.update(auto_paused=False)
                return
            self.update(state=BoxState.PAUSED)
            log.info("box %s is paused: idle for %g s", self.id, self.record.config.auto_pause)

    async def _wake(self) -> None:
        async with self.operation:
            if self.record.auto_paused and self.record.state is BoxState.PAUSED:
                await self._go_on()
                log.info("box %s goes on: it is used", self.id)

    async def _go_on(self) -> None:
        """Let a paused machine run, with the right time; the caller holds the lock."""
        assert self.machine is not None
        await self.unless_ended(self.machine.resume())
        if self.agent is not None:
            try:
                await self.unless_ended(self.agent.set_clock())
            except VoidboxError as error:
                if not self.runs:
                    raise
                # It may hang since before it was paused; that must not keep it from being stopped.
                log.warning("box %s: its clock is late by the pause: %s", self.id, error.message)
        self.update(state=BoxState.RUNNING, auto_paused=False)
        self.activity.rest()

    @property
    def guest(self) -> Guest:
        """The guest of a running box.

        Raises:
            WrongState: the box does not run; the message says why.
        """
        if self.agent is None or self.record.state is not BoxState.RUNNING:
            raise self.wrong_state("running")
        return self.agent

    def wrong_state(self, wanted: str) -> WrongState:
        """What to say to whoever needs it to be `wanted`."""
        state, why = self.record.state.value, self.record.reason
        return WrongState(
            f"box {self.id} is not {wanted} but {state}" + (f": {why}" if why else ""),
            reason="BOX_NOT_RUNNING",
            box=self.id,
            state=state,
        )

    async def explain(self, failure: VoidboxError) -> VoidboxError:
        """`failure` of a call to the guest, or what it means if the box's end has cut the call off.

        What the guest itself answered names a reason of its own and is returned as it is.
        """
        if not isinstance(failure, (Unavailable, Cancelled)) or failure.reason != failure.default_reason:
            return failure
        if isinstance(failure, Cancelled) and not self.ended.is_set():
            return failure
        return await self._died() or failure

    async def _died(self) -> Unavailable | None:
        machine = self.machine
        if machine is None and not self.ended.is_set():
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_NOTICE_SECONDS):
                await self.ended.wait()
        if not self.ended.is_set() and self.record.state is not BoxState.STOPPING:
            return None
        return Unavailable(
            f"box {self.id} has ended: {self.record.reason or self.record.state.value}",
            reason="BOX_DIED",
            box=self.id,
            end_reason=self.record.reason,
        )

    def asked_to_power_off(self) -> None:
        """Note that the guest was asked to power off through its own agent."""
        if self.record.state is BoxState.RUNNING:
            self._asked = "the guest powered off as asked"

    async def pause(self) -> None:
        """Stop its processors. Idempotent.

        Raises:
            WrongState: it neither runs nor is paused.
        """
        async with self.operation:
            if self.record.state is BoxState.PAUSED:
                if self.record.auto_paused:
                    self.update(auto_paused=False)  # from now on it stays so
                return
            if self.record.state is not BoxState.RUNNING or self.machine is None:
                raise self.wrong_state("running")
            await self.unless_ended(self.machine.pause())
            self.update(state=BoxState.PAUSED)

    async def resume(self) -> None:
        """Let its processors go on. Idempotent.

        Raises:
            WrongState: it neither runs nor is paused.
        """
        async with self.operation:
            if self.record.state is BoxState.RUNNING:
                return
            if self.record.state is not BoxState.PAUSED or self.machine is None:
                raise self.wrong_state("paused")
            await self._go_on()

    async def capture(self, into: Saved, layers: Path) -> float:
        """Save the running box and let it go on.

        Args:
            into: Receives memory, devices, and what whoever restores them has to know.
            layers: Directory that receives its disks' private layers.

        Returns:
            Seconds that its programs stood still.

        Raises:
            WrongState: it does not run, or cannot be saved.
            VoidboxError: it could not be saved; it goes on.
        """
        async with self.in_use(), self.operation:
            guest, machine = self.guest, self.machine
            assert machine is not None
            if self.record.config.mounts:
                raise WrongState(
                    f"box {self.id} has host directories mounted, and what of them is open cannot be "
                    "saved; copy the files in instead: voidbox cp",
                    reason="BOX_HAS_MOUNTS",
                    box=self.id,
                )
            if self.record.origin == "boot":
                raise WrongState(
                    f"box {self.id} booted by itself; only a box that was restored can be saved (leave out "
                    "cold_boot)",
                    reason="BOX_BOOTED_COLD",
                    box=self.id,
                )
            began = 0.0

            async def stand_still() -> None:
                nonlocal began
                began = time.monotonic()
                await guest.freeze(True)

            # On disk first: a service that dies now leaves a machine that stands still.
            self.update(capturing=True)
            try:
                await self.unless_ended(machine.capture(into, layers, stand_still))
            finally:
                if began and self.runs:
                    if self.record.config.egress:
                        await self.unless_ended(guest.configure_network())
                    await self.unless_ended(guest.freeze(False))
                self.update(capturing=False)
            into.facts |= {"secret": guest.metadata[0][1].hex(), "frozen": True}
            return time.monotonic() - began

    def usage(self) -> stats.Usage:
        """What its processes take of the host."""
        return (
            stats.of((*self.machine.pids, *self.network.pids)) if self.machine is not None else stats.Usage()
        )

    def vsock_bytes(self) -> tuple[int, int]:
        """Bytes sent to and received from the guest over vsock."""
        return self.machine.vsock_bytes() if self.machine is not None else (0, 0)

    def disk_bytes(self) -> int:
        """What its writable disks take of the host's disk."""
        return sum(path.stat().st_blocks * 512 for path in self.directory.glob("*.qcow2"))

    def resident_mib(self) -> int:
        """Its resident memory; cheap."""
        return sum(map(stats.resident_bytes, self.machine.pids)) >> 20 if self.machine is not None else 0

    # Ending

    async def stop(self, grace: float, why: str) -> None:
        """End it: the guest is asked, then QEMU, then both are killed. Idempotent.

        Args:
            grace: Seconds for the guest to end by itself; 0 kills at once.
            why: For the record.

        Raises:
            Unavailable: its processes do not end.
        """
        rests = await self._rests_within(grace)
        # Another stop has a grace of its own.
        other_stop = self.record.state is BoxState.STOPPING and grace > 0
        if not rests and not other_stop and self.machine is not None:
            # What is under way may hang with the guest, for minutes; it ends with the machine.
            self._asked = why
            await self.machine.kill(gently=False)
        async with self.operation:
            machine = self.machine
            if not self.record.state.alive or machine is None:
                return
            ask = grace > 0 and self.record.state in (BoxState.RUNNING, BoxState.PAUSED)
            if ask and self.record.state is BoxState.PAUSED:
                # It cannot end in order while it stands still: its programs, and what its disks are owed.
                with contextlib.suppress(VoidboxError):
                    await machine.resume()
            self._asked = why
            if self.record.state is not BoxState.STOPPING:
                self.update(state=BoxState.STOPPING, reason=why)
            if ask and self.agent is not None:
                await self._ask_guest(self.agent, machine, grace)
            await machine.kill(gently=grace > 0)
            await self.ended.wait()

    async def _rests_within(self, seconds: float) -> bool:
        """Whether no operation is under way, or the one that is ends in so many seconds."""
        try:
            async with asyncio.timeout(seconds if self.operation.locked() else None):
                await self.operation.acquire()
        except TimeoutError:
            return False
        self.operation.release()
        return True

    async def _ask_guest(self, guest: Guest, machine: Machine, grace: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                try:
                    await guest.shut_down(min(PROGRAM_GRACE_SECONDS, grace / 2))
                except VoidboxError as error:
                    if machine.ended.is_set():
                        return
                    log.debug("box %s did not answer Shutdown: %s", self.id, error)
                await machine.ended.wait()

    async def destroy(self, why: str) -> None:
        """Kill what runs of a box that did not come up; nothing is saved, only told."""
        if self.record.state.alive:
            self.record = dataclasses.replace(
                self.record, state=BoxState.FAILED, reason=why, end_time=time.time()
            )
            self._on_change(self.record)
        if self.machine is not None:
            await self.machine.kill(gently=False)
        await self.network.end()
        await self.let_go()
