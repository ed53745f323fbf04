"""Every socket, pipe and descriptor of a machine, made before anything runs."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from services.common.process import clean_env
from services.hypervisor import console, layout, saved
from services.hypervisor.argv import (
    SAVED_NIC_PORTS,
    SAVED_PORTS,
    VHOST_SOCKET,
    DiskDevice,
    MachineConfig,
    ShareDevice,
    VsockDevice,
    build_argv,
    kernel_command_line,
)
from services.hypervisor.driver import MachinePlan
from services.hypervisor.inputs import Identity, device_groups
from services.hypervisor.model import Accelerator, MountMode, Transport
from services.hypervisor.prepare import all_disks, disk_serial, share_tag
from services.hypervisor.probe import KVM
from services.hypervisor.programs import Programs
from services.hypervisor.shim_config import ShimConfig

# The shim's own limit for QEMU on SIGTERM, within that of whoever ends the machine.
_SHIM_TERM_SECONDS = 2.0
# The guest may be slow to take a stream while it boots; calls have deadlines of their own.
_CONNECT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Endpoints:
    """What a start needs: the shim's side (`config_read`) and ours."""

    config: ShimConfig
    config_read: int
    config_write: IO[bytes]
    ready: IO[bytes]
    monitor: socket.socket
    vsock: VsockDevice
    state_fd: int | None


def endpoints(
    plan: MachinePlan,
    programs: Programs,
    directory_fd: int,
    given: contextlib.ExitStack,
    ours: contextlib.ExitStack,
    lasting: contextlib.AsyncExitStack,
) -> Endpoints:
    """Make every socket and pipe before anything runs, so that nothing is ever waited for by polling.

    Args:
        plan: The machine.
        programs: What it is run by.
        directory_fd: The box's directory, open.
        given: Closes what only the new processes keep.
        ours: Closes what is needed until they run.
        lasting: Closes what is needed as long as the machine is.
    """

    def own(fd: int) -> int:
        given.callback(os.close, fd)
        return fd

    monitor, monitor_theirs = socket.socketpair()
    lasting.callback(monitor.close)
    given.enter_context(monitor_theirs)
    guest = given.enter_context(listen(directory_fd, layout.GUEST_SOCKET))
    adopt = given.enter_context(listen(directory_fd, layout.QMP_SOCKET))
    console_read, console_write = map(own, os.pipe2(os.O_CLOEXEC))
    console_log = own(console.create(plan.directory / layout.CONSOLE_FILE))
    exit_file = given.enter_context(new_file(plan.directory / layout.EXIT_FILE))
    stats_file = given.enter_context(new_file(plan.directory / layout.STATS_FILE, append=False))
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    own(ready_write)
    ready = ours.enter_context(os.fdopen(ready_read, "rb"))
    config_read, config_write = os.pipe2(os.O_CLOEXEC)
    own(config_read)
    config_pipe = ours.enter_context(os.fdopen(config_write, "wb", buffering=0))
    pass_fds = [console_write, monitor_theirs.fileno(), adopt.fileno(), *plan.mount_fds]
    pass_fds += [fd for fd in (plan.kernel_fd, plan.initramfs_fd) if fd is not None]
    disks = disk_devices(plan)[: plan.restored_disks if plan.saved else None]
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
        listener, device_fd = _device_directory(plan.directory, plan.identity)
        vhost_listen = given.enter_context(listener).fileno()
    else:
        device_fd = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
    pass_fds.append(own(device_fd))
    vsock = VsockDevice(transport=plan.transport, cid=plan.cid, fd=device_fd)
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
        shares=share_devices(plan),
        memory_fd=memory_fd,
        incoming=plan.saved is not None,
        ports=1 if memory_fd is None else SAVED_PORTS,
        nic_ports=int(bool(plan.config.egress)) if memory_fd is None else SAVED_NIC_PORTS,
        reclaims=programs.reclaims,
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
        file_fds=plan.file_fds,
        overlays=plan.overlays,
        rooted_fds=plan.rooted_fds,
        devices=(KVM,) if plan.accelerator is Accelerator.KVM else (),
        memory_fd=memory_fd if plan.saved is not None and programs.reclaims else None,
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
    return Endpoints(config, config_read, config_pipe, ready, monitor, vsock, state_fd)


def _device_directory(directory: Path, identity: Identity) -> tuple[socket.socket, int]:
    """The vhost-user socket in a directory that the machine's user, and nobody else, can enter."""
    path = directory / layout.DEVICE_DIRECTORY
    path.mkdir(mode=0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = listen(fd, VHOST_SOCKET)
    if os.geteuid() == 0:
        os.chown(path / VHOST_SOCKET, identity.uid, identity.gid)
        os.fchown(fd, identity.uid, identity.gid)
    return listener, fd


def listen(directory_fd: int, name: str) -> socket.socket:
    """A listening socket in an open directory, however long the directory's path is."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(f"/proc/self/fd/{directory_fd}/{name}")
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def new_file(path: Path, *, append: bool = True) -> IO[bytes]:
    """A new file of ours, open for writing; it must not exist."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | (os.O_APPEND if append else 0)
    fd = os.open(path, flags, 0o600)
    return os.fdopen(fd, "wb", buffering=0)


def disk_devices(plan: MachinePlan) -> tuple[DiskDevice, ...]:
    """The disks of a plan as QEMU is given them."""
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
              if share.mode is not MountMode.READ_ONLY]  # fmt: skip
    return (*found, *((memory_fd,) if memory_fd is not None else ()))


def share_devices(plan: MachinePlan) -> tuple[ShareDevice, ...]:
    """The shares of a plan as QEMU is given them."""
    return tuple(
        ShareDevice(tag=share_tag(number), directory_fd=fd, read_only=mount.mode is MountMode.READ_ONLY)
        for number, (mount, fd) in enumerate(zip(plan.config.mounts, plan.mount_fds, strict=True))
    )


def _accelerator_groups(accelerator: Accelerator) -> tuple[int, ...]:
    """The group that may open /dev/kvm, if the accelerator is KVM."""
    if accelerator is not Accelerator.KVM:
        return ()
    return device_groups(os.stat(KVM))
