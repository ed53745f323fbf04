"""Machines by QEMU: each one a shim process with QEMU as its child, in the box's directory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import grpc

from services.common.errors import Internal, NotFound, Unavailable, VoidboxError, WrongState
from services.common.process import clean_env
from services.hypervisor import capture, claim, console, disks, failure, layout, qmp, record, saved
from services.hypervisor.argv import (
    SAVED_PORTS,
    VHOST_SOCKET,
    DiskDevice,
    MachineConfig,
    ShareDevice,
    VsockDevice,
    build_argv,
    kernel_command_line,
)
from services.hypervisor.driver import Machine, MachinePlan, NotRestored
from services.hypervisor.failure import Remains
from services.hypervisor.inputs import Identity, device_groups
from services.hypervisor.model import Accelerator, BoxRecord, MountMode, Transport
from services.hypervisor.monitor import Monitor
from services.hypervisor.pidfd import Process
from services.hypervisor.prepare import all_disks, disk_serial, share_tag
from services.hypervisor.probe import KVM
from services.hypervisor.programs import Programs
from services.hypervisor.saved import Saved
from services.hypervisor.shim_config import STATS, ExitRecord, ShimConfig

# Python and QEMU start within 0.3 s on an idle host; a loaded one may need long.
START_SECONDS = 30.0
# The rungs of the ladder that ends a machine; each is reached only if the one before failed.
QUIT_SECONDS = 3.0
TERM_SECONDS = 4.0
KILL_SECONDS = 5.0
# The shim's own limit for QEMU on SIGTERM, within ours.
_SHIM_TERM_SECONDS = 2.0
# The guest may be slow to take a stream while it boots; calls have deadlines of their own.
_CONNECT_SECONDS = 600.0
_ORDERLY = ("exited", "terminated")
_LOG_TAIL = 4000


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
        return _remains(directory, shutdown="")


class QemuMachine:
    """A `Machine` whose leading process is the shim; QEMU cannot outlive it (PDEATHSIG)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = contextlib.AsyncExitStack()
        self._shim: Process | None = None
        self._monitor = Monitor()
        self._vsock: VsockDevice | None = None
        self._vsock_port = 0
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
                ends = self._endpoints(plan, programs, given, ours)
                log = given.enter_context(_new_file(self._directory / layout.LOG_FILE))
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
                    await self._load(plan, ends.state_fd)
            except (TimeoutError, VoidboxError) as error:
                failed = await self._did_not_start(plan)
                raise (failed if plan.saved is None else NotRestored(failed.message)) from error
            if plan.saved is not None:
                await self._plug(plan, ends.vsock)

    async def _load(self, plan: MachinePlan, state_fd: int) -> None:
        await self._monitor.load(state_fd)
        plan.note("load")

    async def _plug(self, plan: MachinePlan, vsock: VsockDevice) -> None:
        """Give a restored machine what is its own, and let it go on."""
        await self._plug_vsock(vsock, plan.vsock_port)
        disks = _disk_devices(plan)[plan.restored_disks :]
        await self._monitor.plug(disks, _share_devices(plan), plan.restored_disks)
        await self._monitor.execute("cont")
        plan.note("plug")

    def _endpoints(
        self,
        plan: MachinePlan,
        programs: Programs,
        given: contextlib.ExitStack,
        ours: contextlib.ExitStack,
    ) -> _Endpoints:
        """Make every socket and pipe before anything runs, so that nothing is ever waited for by polling."""

        def own(fd: int) -> int:
            given.callback(os.close, fd)
            return fd

        monitor, monitor_theirs = socket.socketpair()
        self._stack.callback(monitor.close)
        given.enter_context(monitor_theirs)
        guest = given.enter_context(_listen(self._directory_fd, layout.GUEST_SOCKET))
        adopt = given.enter_context(_listen(self._directory_fd, layout.QMP_SOCKET))
        console_read, console_write = map(own, os.pipe2(os.O_CLOEXEC))
        console_log = own(console.create(self._directory / layout.CONSOLE_FILE))
        exit_file = given.enter_context(_new_file(self._directory / layout.EXIT_FILE))
        stats_file = given.enter_context(_new_file(self._directory / layout.STATS_FILE, append=False))
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        own(ready_write)
        ready = ours.enter_context(os.fdopen(ready_read, "rb"))
        config_read, config_write = os.pipe2(os.O_CLOEXEC)
        own(config_read)
        config_pipe = ours.enter_context(os.fdopen(config_write, "wb", buffering=0))
        pass_fds = [console_write, monitor_theirs.fileno(), adopt.fileno(), *plan.mount_fds]
        pass_fds += [fd for fd in (plan.kernel_fd, plan.initramfs_fd) if fd is not None]
        disks = _disk_devices(plan)[: plan.restored_disks if plan.saved else None]
        pass_fds += [fd for disk in disks for fd in (disk.base_fd, disk.overlay_fd) if fd is not None]
        memory_fd = state_fd = None
        if plan.saved is not None:
            memory_fd = plan.saved.memory_fd
            state_fd = own(saved.reopened(plan.saved.devices_fd, os.O_RDONLY))
            pass_fds += [memory_fd, state_fd]
        elif plan.into is not None:
            memory_fd = plan.into.memory_fd
            pass_fds.append(memory_fd)
        vhost_listen: int | None = None
        if plan.transport is Transport.VHOST_USER:
            listener, device_fd = self._device_directory(plan.identity)
            vhost_listen = given.enter_context(listener).fileno()
        else:
            device_fd = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
        pass_fds.append(own(device_fd))
        vsock = VsockDevice(transport=plan.transport, cid=plan.cid, fd=device_fd)
        self._note_vsock(vsock, 0)
        machine = MachineConfig(
            program=programs.system,
            name=plan.box_id,
            accelerator=plan.accelerator,
            memory_mib=plan.config.resources.memory_mib,
            vcpus=plan.config.resources.vcpus,
            kernel_fd=plan.kernel_fd,
            initramfs_fd=plan.initramfs_fd,
            command_line=kernel_command_line(plan.accelerator, plan.config.resources.vcpus),
            console_fd=console_write,
            vsock=vsock,
            monitor_fd=monitor_theirs.fileno(),
            monitor_listen_fd=adopt.fileno(),
            disks=disks,
            shares=_share_devices(plan),
            memory_fd=memory_fd,
            incoming=plan.saved is not None,
            ports=1 if memory_fd is None else SAVED_PORTS,
        )
        drop = os.geteuid() == 0
        config = ShimConfig(
            argv=tuple(build_argv(machine)),
            env=clean_env(),
            uid=plan.identity.uid if drop else None,
            gid=plan.identity.gid if drop else None,
            groups=_accelerator_groups(plan.accelerator) if drop else (),
            pass_fds=tuple(pass_fds),
            writable_fds=_writable_fds(plan, disks, memory_fd),
            devices=(KVM,) if plan.accelerator is Accelerator.KVM else (),
            namespaces=programs.confinement.namespaces,
            landlock=programs.confinement.landlock,
            cid=plan.cid,
            transport="vhost-user" if plan.transport is Transport.VHOST_USER else "vhost-vsock",
            vhost_listen_fd=vhost_listen,
            guest_listen_fd=guest.fileno(),
            console_read_fd=console_read,
            console_log_fd=console_log,
            stats_fd=stats_file.fileno(),
            exit_fd=exit_file.fileno(),
            ready_fd=ready_write,
            term_seconds=_SHIM_TERM_SECONDS,
            connect_seconds=_CONNECT_SECONDS,
        )
        return _Endpoints(config, config_read, config_pipe, ready, monitor, vsock, state_fd)

    def _device_directory(self, identity: Identity) -> tuple[socket.socket, int]:
        """The vhost-user socket in a directory that the machine's user, and nobody else, can enter."""
        path = self._directory / layout.DEVICE_DIRECTORY
        path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        listener = _listen(fd, VHOST_SOCKET)
        if os.geteuid() == 0:
            os.chown(path / VHOST_SOCKET, identity.uid, identity.gid)
            os.fchown(fd, identity.uid, identity.gid)
        return listener, fd

    async def _did_not_start(self, plan: MachinePlan) -> VoidboxError:
        await self.kill(gently=False)
        return failure.boot_failure(
            plan.box_id, plan.config.kernel_path, plan.config.resources.memory_mib, self.remains()
        )

    # Taking up

    async def _adopt(self, found: BoxRecord) -> None:
        self._watch(found.shim_pid, found.shim_start)
        self.vmm_pid = found.vmm_pid
        self._read_vsock()
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
                    await vmm.wait(KILL_SECONDS)
                finally:
                    vmm.close()
        if self._monitor.client is not None:
            with contextlib.suppress(TimeoutError):  # its last events say why it ended
                async with asyncio.timeout(KILL_SECONDS):
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

    async def complete(self, plan: MachinePlan) -> None:
        """See `Machine.complete`."""
        await self._monitor.plug(_disk_devices(plan), ())
        await self._monitor.execute("cont")
        plan.note("plug")

    async def _plug_vsock(self, vsock: VsockDevice, port: int) -> None:
        self._note_vsock(vsock, port)
        await self._monitor.plug_vsock(vsock, port)

    def _note_vsock(self, vsock: VsockDevice, port: int) -> None:
        """Remember the device, also for a service that takes this machine up."""
        self._vsock, self._vsock_port = vsock, port
        text = json.dumps(
            {"transport": vsock.transport.value, "cid": vsock.cid, "fd": vsock.fd, "port": port}
        )
        record.write_atomically(self._directory / layout.DEVICE_FILE, text.encode())

    def _read_vsock(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads((self._directory / layout.DEVICE_FILE).read_bytes())
            self._vsock_port = int(found["port"])
            self._vsock = VsockDevice(
                transport=Transport(found["transport"]), cid=int(found["cid"]), fd=int(found["fd"])
            )

    async def capture(self, into: Saved, layers: Path, before: Callable[[], Awaitable[None]]) -> None:
        """See `Machine.capture`."""
        if self._vsock is None:
            raise WrongState("it is not known how its vsock device is plugged in", reason="NOT_RESTORED")
        with await asyncio.to_thread(capture.opened, self.vmm_pid) as memory:
            await asyncio.to_thread(memory.copy_origin, into.memory_fd)
            port = self._vsock_port
            await before()
            await self._monitor.unplug_vsock(port, self._vsock.transport)
            try:
                await self._monitor.execute("stop")
                await self._save_devices(into)
                await asyncio.to_thread(memory.copy_own, into.memory_fd)
                await asyncio.to_thread(disks.clone_all, self._directory, layers)
                into.facts["vsock_port"] = 1 - port
            finally:
                # On the other port: one that has just lost its device does not always take the next.
                await self._plug_vsock(self._vsock, 1 - port)
                await self._monitor.execute("cont")

    async def recover(self) -> None:
        """See `Machine.recover`; where it was left is not known, so its vsock device is plugged in anew."""
        if self._vsock is None:
            raise WrongState("it is not known how its vsock device is plugged in", reason="NOT_RESTORED")
        await self._monitor.execute("cont")
        for port in await self._monitor.vsock_ports():
            await self._monitor.unplug_vsock(port, self._vsock.transport)
            self._vsock_port = port
        await self._monitor.forget_backends()
        await self._plug_vsock(self._vsock, 1 - self._vsock_port)

    async def save(self, into: Saved) -> None:
        """See `Machine.save`."""
        assert self._vsock is not None
        await self._monitor.unplug_vsock(self._vsock_port, self._vsock.transport)
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
        """See `Machine.kill`: QMP quit (QEMU flushes its disks), SIGTERM, SIGKILL."""
        if self._shim is None:
            self.ended.set()
            return
        if gently and self._monitor.client is not None:
            with contextlib.suppress(VoidboxError):
                await self._monitor.client.execute("quit", seconds=QUIT_SECONDS)
            await self._ends_within(QUIT_SECONDS)
        if gently and not self.ended.is_set():
            self._shim.send(signal.SIGTERM)
            await self._ends_within(TERM_SECONDS)
        if not self.ended.is_set():
            self._shim.kill_group()
            await self._ends_within(KILL_SECONDS)
        if not self.ended.is_set():
            raise Unavailable(
                f"processes {self.pids} do not end although they were killed; look at their state in ps",
                reason="PROCESS_STUCK",
            )

    async def _ends_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.ended.wait()

    def remains(self) -> Remains:
        """See `Machine.remains`."""
        return _remains(self._directory, self._shutdown)

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


@dataclass(frozen=True, slots=True)
class _Endpoints:
    """What a start needs: the shim's side (`config_read`) and ours."""

    config: ShimConfig
    config_read: int
    config_write: IO[bytes]
    ready: IO[bytes]
    monitor: socket.socket
    vsock: VsockDevice
    state_fd: int | None


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


def _listen(directory_fd: int, name: str) -> socket.socket:
    """A listening socket in an open directory, however long the directory's path is."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(f"/proc/self/fd/{directory_fd}/{name}")
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def _new_file(path: Path, *, append: bool = True) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | (os.O_APPEND if append else 0)
    fd = os.open(path, flags, 0o600)
    return os.fdopen(fd, "wb", buffering=0)


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


def _disk_devices(plan: MachinePlan) -> tuple[DiskDevice, ...]:
    return tuple(
        DiskDevice(
            serial=disk_serial(plan.config, number), base_fd=base, base_format=disk.format, overlay_fd=layer
        )
        for number, (disk, (base, layer)) in enumerate(
            zip(all_disks(plan.config), plan.disk_fds, strict=True)
        )
    )


def _writable_fds(plan: MachinePlan, disks: tuple[DiskDevice, ...], memory_fd: int | None) -> tuple[int, ...]:
    """What QEMU may open anew for writing: its layers, its RAM, and what is shared for writing."""
    found = [disk.overlay_fd for disk in disks if disk.overlay_fd is not None]
    found += [fd for share, fd in zip(plan.config.mounts, plan.mount_fds, strict=True)
              if share.mode is MountMode.READ_WRITE]  # fmt: skip
    return (*found, *((memory_fd,) if memory_fd is not None else ()))


def _share_devices(plan: MachinePlan) -> tuple[ShareDevice, ...]:
    return tuple(
        ShareDevice(tag=share_tag(number), directory_fd=fd, read_only=mount.mode is not MountMode.READ_WRITE)
        for number, (mount, fd) in enumerate(zip(plan.config.mounts, plan.mount_fds, strict=True))
    )


def _accelerator_groups(accelerator: Accelerator) -> tuple[int, ...]:
    """The group that may open /dev/kvm, if the accelerator is KVM."""
    if accelerator is not Accelerator.KVM:
        return ()
    return device_groups(os.stat(KVM))


def _remains(directory: Path, shutdown: str) -> Remains:
    record = None
    with contextlib.suppress(OSError, ValueError, TypeError):
        record = ExitRecord.from_json((directory / layout.EXIT_FILE).read_bytes())
    log = ""
    with contextlib.suppress(OSError):
        data = (directory / layout.LOG_FILE).read_bytes()[-_LOG_TAIL:]
        # The device process logs lines of JSON there; its failures are in the exit record.
        lines = console.printable(data).splitlines()
        log = "\n".join(line for line in lines if not line.startswith('{"at":'))
    return Remains(
        exit_code=record.exit_code if record else None,
        exit_signal=(record.signal or 0) if record else 0,
        recorded=record is not None,
        device=record.detail or record.reason if record and record.reason not in _ORDERLY else "",
        shutdown=shutdown,
        console=console.tail(directory / layout.CONSOLE_FILE),
        log=log,
    )
