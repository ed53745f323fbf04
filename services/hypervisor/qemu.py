"""Machines by QEMU: each one a shim process with QEMU as its child, in the box's directory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO

import grpc

from services.common.errors import Internal, NotFound, Unavailable, VoidboxError
from services.common.process import clean_env
from services.hypervisor import (
    capture,
    claim,
    disks,
    failure,
    ladder,
    layout,
    leftovers,
    qmp,
    saved,
    stats,
)
from services.hypervisor.argv import VsockDevice
from services.hypervisor.driver import Machine, MachinePlan, NotRestored
from services.hypervisor.endpoints import disk_devices, endpoints, new_file, share_devices
from services.hypervisor.failure import Remains
from services.hypervisor.model import BoxRecord
from services.hypervisor.monitor import Monitor
from services.hypervisor.nic_plug import NicPlug
from services.hypervisor.pidfd import Process
from services.hypervisor.programs import Programs
from services.hypervisor.saved import Saved
from services.hypervisor.shim_config import STATS, ShimConfig
from services.hypervisor.vsock_plug import VsockPlug

# Python and QEMU start within 0.3 s on an idle host; a loaded one may need long.
START_SECONDS = 30.0


class QemuDriver:
    """A `Driver` that starts QEMU."""

    def __init__(self, programs: Programs | None = None) -> None:
        self._programs = programs

    async def start(self, plan: MachinePlan, on_spawned: Callable[[int, int], None]) -> Machine:
        """See `Driver.start`."""
        if self._programs is None:
            raise Internal("a driver without programs can only adopt")
        machine = QemuMachine(plan.directory)
        try:
            await machine._start(plan, self._programs, on_spawned)
        except BaseException:
            await machine.kill(gently=False)
            await machine.close()
            raise
        return machine

    async def adopt(self, record: BoxRecord, directory: Path) -> Machine:
        """See `Driver.adopt`."""
        machine = QemuMachine(directory)
        try:
            await machine._adopt(record)
        except BaseException:
            await machine.close()
            raise
        return machine

    def leftovers(self, record: BoxRecord, directory: Path) -> Remains:
        """See `Driver.leftovers`."""
        return leftovers.read(directory, shutdown="")


class QemuMachine:
    """A `Machine` whose leading process is the shim; QEMU cannot outlive it (PDEATHSIG)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = contextlib.AsyncExitStack()
        self._shim: Process | None = None
        self._monitor = Monitor()
        self._plug = VsockPlug(directory, self._monitor)
        # Of one that is still to be restored: its state's descriptor in QEMU, and the device to plug in then.
        self._unloaded: tuple[int, VsockDevice] | None = None
        self._nic = NicPlug(directory, self._monitor)
        self._shutdown = ""
        self._watcher: asyncio.Task[None] | None = None
        self._directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._stack.callback(os.close, self._directory_fd)
        self.ended = asyncio.Event()
        self.vmm_pid = 0

    @property
    def pids(self) -> tuple[int, ...]:
        """See `Machine.pids`."""
        return tuple(pid for pid in (self._shim.pid if self._shim else 0, self.vmm_pid) if pid)

    # Starting

    async def _start(
        self, plan: MachinePlan, programs: Programs, on_spawned: Callable[[int, int], None]
    ) -> None:
        with contextlib.ExitStack() as ours:
            with contextlib.ExitStack() as given:  # what only the new processes keep
                ends = endpoints(plan, programs, self._directory_fd, given, ours, self._stack)
                self._plug.note(ends.vsock, 0)
                log = given.enter_context(new_file(self._directory / layout.LOG_FILE))
                pid = await asyncio.to_thread(_spawn_shim, ends.config, ends.config_read, log)
                self._watch(pid, None)
                assert self._shim is not None
                on_spawned(self._shim.pid, self._shim.started)
            # The shim has waited for this: had we died before, it would have ended at once.
            with contextlib.suppress(BrokenPipeError):
                ends.config_write.write(ends.config.to_json())
                ends.config_write.close()
            try:
                async with asyncio.timeout(START_SECONDS):
                    self.vmm_pid = await _spawned_pid(ends.ready)
                self._monitor.client = await self._stack.enter_async_context(
                    qmp.connect(ends.monitor, on_event=self._on_event, seconds=START_SECONDS)
                )
                plan.note("spawn")
                if ends.state_fd is not None:
                    self._unloaded = ends.state_fd, ends.vsock
                    if plan.ahead:
                        return
                    await self._load(plan)
            except (TimeoutError, VoidboxError) as error:
                failed = await self._did_not_start(plan)
                raise (failed if plan.saved is None else NotRestored(failed.message)) from error
            if plan.saved is not None:
                await self._plug_own(plan)

    async def _load(self, plan: MachinePlan) -> None:
        assert self._unloaded is not None
        await self._monitor.load(self._unloaded[0])
        plan.note("load")

    async def _plug_own(self, plan: MachinePlan) -> None:
        """Give a restored machine what is its own, and let it go on."""
        assert self._unloaded is not None
        vsock, self._unloaded = self._unloaded[1], None
        await self._plug.put_in(vsock, plan.vsock_port)
        own = disk_devices(plan)[plan.restored_disks :]
        await self._monitor.plug(own, share_devices(plan), plan.restored_disks)
        await self._monitor.execute("cont")
        plan.note("plug")

    async def _did_not_start(self, plan: MachinePlan) -> VoidboxError:
        await self.kill(gently=False)
        return failure.boot_failure(
            plan.box_id, plan.config.kernel_path, plan.config.resources.memory_mib, self.remains()
        )

    # Taking up

    async def _adopt(self, found: BoxRecord) -> None:
        self._watch(found.shim_pid, found.shim_start)
        self.vmm_pid = found.vmm_pid
        self._plug.read()
        self._nic.read()
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        try:
            connection.connect(f"/proc/self/fd/{self._directory_fd}/{layout.QMP_SOCKET}")
        except OSError as error:
            connection.close()
            raise Unavailable(f"QEMU's monitor: {error.strerror}", reason="QMP_CLOSED") from error
        self._monitor.client = await self._stack.enter_async_context(
            qmp.connect(connection, on_event=self._on_event)
        )

    # Living

    def _watch(self, pid: int, started: int | None) -> None:
        self._shim = Process.watch(pid, started)
        self._stack.callback(self._shim.close)
        self._watcher = asyncio.create_task(self._until_end(self._shim), name=f"watch {pid}")

    async def _until_end(self, shim: Process) -> None:
        await shim.wait()
        # PDEATHSIG has been sent to QEMU by now, if it still ran; its end takes an instant.
        with contextlib.suppress(NotFound):
            if self.vmm_pid:
                vmm = Process.watch(self.vmm_pid)
                try:
                    await vmm.wait(ladder.KILL_SECONDS)
                finally:
                    vmm.close()
        if self._monitor.client is not None:
            with contextlib.suppress(TimeoutError):  # its last events say why it ended
                async with asyncio.timeout(ladder.KILL_SECONDS):
                    await self._monitor.client.closed.wait()
        self.ended.set()

    def _on_event(self, event: qmp.Event) -> None:
        if event.name == "SHUTDOWN":
            self._shutdown = str(event.data.get("reason", ""))
        self._monitor.on_event(event)

    def guest_channel(self) -> grpc.aio.Channel:
        """See `Machine.guest_channel`."""
        return claim.guest_channel(self._directory_fd, layout.GUEST_SOCKET)

    async def pause(self) -> None:
        """See `Machine.pause`."""
        await self._monitor.execute("stop")

    async def resume(self) -> None:
        """See `Machine.resume`."""
        await self._monitor.execute("cont")

    async def paused(self) -> bool:
        """See `Machine.paused`."""
        status = await self._monitor.execute("query-status")
        return isinstance(status, dict) and status.get("status") == "paused"

    def moved(self, directory: Path) -> None:
        """See `Machine.moved`."""
        self._directory = directory
        self._plug.directory = self._nic.directory = directory

    async def complete(self, plan: MachinePlan) -> None:
        """See `Machine.complete`."""
        if self._unloaded is not None:
            await self._load(plan)
            await self._plug_own(plan)
            return
        await self._monitor.plug(disk_devices(plan), ())
        await self._monitor.execute("cont")
        plan.note("plug")

    async def plug_nic(self, tap: int, port: int = 0) -> None:
        """See `Machine.plug_nic`."""
        await self._nic.put_in(tap, port)

    async def capture(self, into: Saved, layers: Path, before: Callable[[], Awaitable[None]]) -> None:
        """See `Machine.capture`."""
        port = self._plug.known().port
        with await asyncio.to_thread(capture.opened, self.vmm_pid) as memory:
            await asyncio.to_thread(memory.copy_origin, into.memory_fd)
            await before()
            await self._nic.take_out()
            await self._plug.take_out()
            try:
                await self._monitor.execute("stop")
                await self._save_devices(into)
                await asyncio.to_thread(memory.copy_own, into.memory_fd)
                await asyncio.to_thread(disks.clone_all, self._directory, layers)
                into.facts["vsock_port"] = 1 - port
                into.facts["nic_port"] = 0 if self._nic.port is None else 1 - self._nic.port
            finally:
                await self._plug.put_back()
                await self._nic.put_back()
                await self._monitor.execute("cont")

    async def recover(self) -> None:
        """See `Machine.recover`; where it was left is not known, so its vsock device is plugged in anew."""
        self._plug.known()
        await self._monitor.execute("cont")
        await self._plug.renew()
        await self._nic.renew()

    async def save(self, into: Saved) -> None:
        """See `Machine.save`."""
        await self._monitor.detach_vsock(self._plug.known().port)
        await self._monitor.execute("stop")
        await self._save_devices(into)

    async def _save_devices(self, into: Saved) -> None:
        state = saved.reopened(into.devices_fd, os.O_WRONLY)
        try:
            await self._monitor.save(state)
        finally:
            os.close(state)

    # Ending

    async def kill(self, *, gently: bool) -> None:
        """See `Machine.kill`."""
        if self._shim is None:
            self.ended.set()
            return
        await ladder.end(self._shim, self._monitor.client, self.ended, self.pids, gently=gently)

    def remains(self) -> Remains:
        """See `Machine.remains`."""
        return leftovers.read(self._directory, self._shutdown)

    def cpu_seconds(self) -> float:
        """See `Machine.cpu_seconds`."""
        return sum(map(stats.cpu_seconds, self.pids))

    def vsock_bytes(self) -> tuple[int, int]:
        """See `Machine.vsock_bytes`."""
        try:
            data = (self._directory / layout.STATS_FILE).read_bytes()
        except OSError:
            return 0, 0
        return STATS.unpack(data) if len(data) == STATS.size else (0, 0)

    async def close(self) -> None:
        """See `Machine.close`."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None
        await self._stack.aclose()


def _spawn_shim(config: ShimConfig, config_fd: int, log: IO[bytes]) -> int:
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "services.hypervisor.shim", "--config-fd", str(config_fd)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd="/",
        env=clean_env(),
        pass_fds=(config_fd, *config.inherited_fds()),
        start_new_session=True,
    )
    child.returncode = 0  # it is watched and reaped by pidfd; Popen must not try, nor warn
    return child.pid


async def _spawned_pid(pipe: IO[bytes]) -> int:
    """QEMU's pid from the shim's `spawned <pid>` line; closes `pipe`.

    Raises:
        Unavailable: the shim ended first.
    """
    reader = asyncio.StreamReader(limit=256)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
    try:
        line = await reader.readline()
    finally:
        transport.close()
    if not line.startswith(b"spawned "):
        raise Unavailable("the shim ended before it started QEMU", reason="MACHINE_FAILED")
    return int(line.split()[1])
