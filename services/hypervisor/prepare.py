"""From a box's configuration to a machine's plan: everything is opened and checked here."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import stat
from collections.abc import Callable, Collection
from pathlib import Path

from services.common.errors import InvalidInput, NotBuilt, WrongState
from services.hypervisor import disks, inputs
from services.hypervisor.changes import ChangeStore, overlays
from services.hypervisor.claim import Attachment
from services.hypervisor.driver import MachinePlan
from services.hypervisor.egress.settings import GatewaySettings
from services.hypervisor.identities import Identities
from services.hypervisor.inputs import Identity
from services.hypervisor.model import Accelerator, BoxConfig, Disk, MountMode, Transport
from services.hypervisor.mounting import SHARED_FILE
from services.hypervisor.programs import Programs
from services.hypervisor.saved import Saved
from services.hypervisor.volumes import Volumes

# CIDs below 3 are reserved (vsock(7)); a random one collides with nobody else's on the host.
_FIRST_CID, _LAST_CID = 1 << 16, (1 << 31) - 1
MAX_DISKS = 16
MAX_MOUNTS = 20
ROOT_SERIAL = "root"


def choose_cid(taken: Collection[int], identities: Identities) -> int:
    """A CID that no box of ours has, and whose user no other box is as long as there are enough."""
    slots = {identities.slot(cid) for cid in taken}
    while True:
        cid = random.randint(_FIRST_CID, _LAST_CID)  # noqa: S311 - uniqueness only
        if cid not in taken and (identities.slot(cid) not in slots or len(slots) == identities.count):
            return cid


def all_disks(config: BoxConfig) -> tuple[Disk, ...]:
    """The disks in the order of their devices: the root disk first, if there is one."""
    return (*((config.root_disk,) if config.root_disk else ()), *config.disks)


def disk_serial(config: BoxConfig, number: int) -> str:
    """The virtio serial of disk `number` of `all_disks`."""
    return ROOT_SERIAL if config.root_disk and number == 0 else f"disk{number}"


def share_tag(number: int) -> str:
    """The 9p mount tag of mount `number`."""
    return f"m{number}"


def attachments(config: BoxConfig, files: Collection[int] = ()) -> list[Attachment]:
    """What the guest has to mount after its claim, disks before shares, outer ones before inner ones.

    Args:
        files: Which of the mounts are single files.
    """
    found = [
        Attachment(
            source=disk_serial(config, number),
            path=disk.guest_path,
            mode=MountMode.READ_WRITE if disk.writable else MountMode.READ_ONLY,
            disk=True,
        )
        for number, disk in enumerate(all_disks(config))
        if disk is not config.root_disk
    ]
    shares = [
        Attachment(
            source=share_tag(number),
            path=mount.guest_path,
            mode=mount.mode,
            file=SHARED_FILE if number in files else "",
        )
        for number, mount in enumerate(config.mounts)
    ]
    # A mount hides what was mounted below its place before.
    return sorted(found + shares, key=lambda each: each.path.rstrip("/").count("/"))


def check_config(config: BoxConfig) -> None:
    """Refuse what no machine can be made of, before anything is opened.

    Raises:
        InvalidInput: too many devices, a bad path or format.
        NotBuilt: a feature of a later version.
    """
    if len(config.disks) > MAX_DISKS:
        raise InvalidInput(f"{len(config.disks)} disks; at most {MAX_DISKS}", reason="TOO_MANY_DISKS")
    if len(config.mounts) > MAX_MOUNTS:
        raise InvalidInput(f"{len(config.mounts)} mounts; at most {MAX_MOUNTS}", reason="TOO_MANY_MOUNTS")
    for disk in all_disks(config):
        if disk.format not in ("raw", "qcow2"):
            raise InvalidInput(
                f"disk {disk.base_path}: format {disk.format!r} must be 'raw' or 'qcow2'", reason="BAD_DISK"
            )
    for disk in config.disks:
        if (
            not os.path.isabs(disk.guest_path)
            or ".." in Path(disk.guest_path).parts
            or disk.guest_path == "/"
        ):
            raise InvalidInput(
                f"disk {disk.base_path}: its path in the box, {disk.guest_path!r}, must be absolute, not '/' "
                "and without '..'",
                reason="BAD_DISK",
            )
    names = [disk.volume for disk in config.disks if disk.volume]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InvalidInput(f"volume {', '.join(sorted(twice))} is there twice", reason="BAD_DISK")
    paths = [item.path.rstrip("/") for item in attachments(config)]
    if twice := {path for path in paths if paths.count(path) > 1}:
        raise InvalidInput(f"two mounts at {', '.join(sorted(twice))}", reason="BAD_MOUNT")


def unsupported(feature: str) -> NotBuilt:
    """The error for a part of a box that this version does not build."""
    return NotBuilt(f"{feature} is not built in this version", reason="NOT_IMPLEMENTED", feature=feature)


async def prepare(
    box_id: str,
    config: BoxConfig,
    directory: Path,
    *,
    programs: Programs,
    accelerator: Accelerator,
    transport: Transport,
    cid: int,
    fallback: Identity,
    volumes: Volumes,
    changes: ChangeStore,
    stack: contextlib.ExitStack,
    boots: bool = True,
    layered: bool = False,
    saved: Saved | None = None,
    note: Callable[[str], None] = lambda _phase: None,
    gateway: GatewaySettings | None = None,
) -> tuple[MachinePlan, tuple[int, int] | None]:
    """Open all that the box is made of and make its private disk layers in `directory`.

    Args:
        stack: Closes the descriptors.
        fallback: Who the machine runs as if no mount decides.
        volumes: Where `config`'s volumes are.
        changes: Where what the box changes in overlays goes.
        boots: Whether it boots, and so needs a kernel.
        layered: Whether the private layers of its disks are in `directory` already, and the saved
            machine has its disks.
        saved: What it is restored from.
        note: Hears of the phases of the machine's start.
        gateway: How gateways are set up on this host.

    Returns:
        The plan, and who the guest's programs run as (None: the agent's default).

    Raises:
        InvalidInput: a kernel, disk or mount that is missing or wrong.
        NotFound, WrongState: a volume that is missing or in use.
        Exhausted: the disk is full.
    """

    def own(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    mount_fds = [own(inputs.open_mount(mount)) for mount in config.mounts]
    file_fds = tuple(fd for fd in mount_fds if not stat.S_ISDIR(os.fstat(fd).st_mode))
    identity, same_user = inputs.machine_identity(zip(config.mounts, mount_fds, strict=True), fallback)
    if (file_fds or overlays(config)) and not programs.confinement.namespaces:
        raise WrongState(
            f"single files and overlays can only be mounted where machines get namespaces of their own; "
            f"this host allows {programs.confinement.detail} (see: voidbox doctor)",
            reason="NO_NAMESPACES",
        )
    layers = await asyncio.to_thread(changes.open_layers, box_id, config, mount_fds, identity, stack)
    kernel = initramfs = None
    if boots:
        kernel, initramfs = await _boot_files(config, identity, stack)
    disk_fds: list[tuple[int, int | None]] = []
    for number, disk in enumerate(all_disks(config)):
        if disk.volume:
            base, private = volumes.open(disk.volume)
            disk_fds.append((own(base), own(private)))
            continue
        base = own(inputs.open_disk_base(disk))
        layer = None
        if disk.writable:
            path = directory / f"{disk_serial(config, number)}.qcow2"
            size = config.resources.disk_mib if disk is config.root_disk else 0
            if layered:
                layer = own(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
            else:
                layer = own(await disks.make_overlay(programs, disk, base, size, path))
        disk_fds.append((base, layer))
    plan = MachinePlan(
        box_id=box_id,
        directory=directory,
        config=config,
        accelerator=accelerator,
        transport=transport,
        cid=cid,
        identity=identity,
        kernel_fd=kernel,
        initramfs_fd=initramfs,
        disk_fds=tuple(disk_fds),
        mount_fds=tuple(mount_fds),
        file_fds=file_fds,
        overlays=layers,
        rooted_fds=tuple(fd for fd, *_ in layers if os.geteuid() == 0 and os.fstat(fd).st_uid == 0),
        saved=saved,
        restored_disks=len(disk_fds) if layered else 0,
        note=note,
        gateway=(gateway or GatewaySettings()) if config.egress else None,
    )
    return plan, (identity.uid, identity.gid) if same_user and identity.uid != 0 else None


async def _boot_files(config: BoxConfig, identity: Identity, stack: contextlib.ExitStack) -> tuple[int, int]:
    """Kernel and initramfs, checked and readable by `identity`."""
    kernel = await asyncio.to_thread(inputs.reopenable, inputs.open_kernel(config.kernel_path), identity)
    stack.callback(os.close, kernel)
    initramfs = inputs.open_initramfs(config.initramfs_path)
    initramfs = await asyncio.to_thread(inputs.reopenable, initramfs, identity)
    stack.callback(os.close, initramfs)
    inputs.check_guest_memory(config.resources.memory_mib, initramfs)
    return kernel, initramfs


async def prepare_template(
    box_id: str,
    config: BoxConfig,
    directory: Path,
    *,
    accelerator: Accelerator,
    transport: Transport,
    cid: int,
    identity: Identity,
    into: Saved,
    stack: contextlib.ExitStack,
    note: Callable[[str], None] = lambda _phase: None,
) -> MachinePlan:
    """The plan of a machine that boots only to be saved: of `config`, kernel and resources count.

    Raises:
        InvalidInput: a kernel or initramfs that is missing or wrong.
    """
    kernel, initramfs = await _boot_files(config, identity, stack)
    return MachinePlan(
        box_id=box_id,
        directory=directory,
        config=dataclasses.replace(config, root_disk=None, disks=(), mounts=()),
        accelerator=accelerator,
        transport=transport,
        cid=cid,
        identity=identity,
        kernel_fd=kernel,
        initramfs_fd=initramfs,
        into=into,
        note=note,
    )
