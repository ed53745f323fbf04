"""The host files that a box is made of, opened and checked before anything starts.

Each becomes a descriptor that the machine inherits, so that the unprivileged machine needs
no permission on any directory, and what was checked is what is used.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import InvalidInput, WrongState
from services.hypervisor.model import Disk, Mount, MountMode

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_ELF = b"\x7fELF\x02\x01"
_EM_X86_64 = 62
# Documentation/arch/x86/boot.rst: boot flag at 0x1FE, "HdrS" at 0x202.
_BOOT_FLAG = slice(0x1FE, 0x200)
_HEADER_MAGIC = slice(0x202, 0x206)
_NEWC = b"070701"
# A kernel without any module or program takes more than this.
_KERNEL_MIB = 16
_COMPRESSED = (
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
    b"\x02\x21\x4c\x18",
    b"\xfd7zXZ",
    b"BZh",
    b"\x04\x22\x4d\x18",
    b"\x5d\x00",
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the machine's processes run as."""

    uid: int
    gid: int


def open_kernel(path: str) -> int:
    """A descriptor of a Linux kernel, checked to be one.

    Raises:
        InvalidInput: missing, unreadable or no x86-64 kernel (reason `BAD_KERNEL`).
    """
    fd = _open_file(path, "kernel", "BAD_KERNEL")
    head = os.pread(fd, 1024, 0)
    elf = head[:6] == _ELF and int.from_bytes(head[18:20], "little") == _EM_X86_64
    if not elf and not (head[_BOOT_FLAG] == b"\x55\xaa" and head[_HEADER_MAGIC] == b"HdrS"):
        os.close(fd)
        raise InvalidInput(
            f"kernel {path} is neither a vmlinux (ELF, x86-64) nor a bzImage; "
            "set sandbox.kernel or VOID_BOX_KERNEL to a Linux kernel, or leave it out for the default",
            reason="BAD_KERNEL",
            path=path,
        )
    return fd


def open_initramfs(path: str) -> int:
    """A descriptor of an initramfs, checked to be one.

    Raises:
        InvalidInput: missing, unreadable or no cpio archive (reason `BAD_INITRAMFS`).
    """
    fd = _open_file(path, "initramfs", "BAD_INITRAMFS")
    head = os.pread(fd, 8, 0)
    if not head.startswith((_NEWC, *_COMPRESSED)):
        os.close(fd)
        raise InvalidInput(
            f"initramfs {path} is no cpio archive (newc, plain or compressed); "
            "set sandbox.initramfs or VOID_BOX_INITRAMFS to one, or leave it out for the default",
            reason="BAD_INITRAMFS",
            path=path,
        )
    return fd


def check_guest_memory(memory_mib: int, initramfs_fd: int) -> None:
    """Refuse a machine whose initramfs cannot fit; some kernels hang instead of saying so.

    The archive stays in memory until it is unpacked, and its files are as long as a plain one.

    Raises:
        InvalidInput: there is too little memory (reason `MEMORY_TOO_SMALL`).
    """
    length = os.fstat(initramfs_fd).st_size
    plain = os.pread(initramfs_fd, len(_NEWC), 0) == _NEWC
    least = _KERNEL_MIB + (length * (2 if plain else 1) >> 20)
    if memory_mib < least:
        raise InvalidInput(
            f"the guest cannot start in {memory_mib} MiB: its initramfs alone needs {least} MiB; "
            "ask for more (spec: sandbox.memory_mb)",
            reason="MEMORY_TOO_SMALL",
            field="resources.memory_mib",
        )


def open_disk_base(disk: Disk) -> int:
    """A descriptor of a disk's base image.

    Raises:
        InvalidInput: missing, unreadable, empty, or not of the size that its digest names.
    """
    fd = _open_file(disk.base_path, "disk", "BAD_DISK")
    size = os.fstat(fd).st_size
    why = ""
    if size == 0 or (disk.format == "raw" and size % 512):
        why = f"its length of {size} bytes is not a positive multiple of 512"
    elif disk.base_size and disk.base_size != size:
        why = f"it has {size} bytes, but its digest is of {disk.base_size}"
    elif disk.format == "qcow2" and os.pread(fd, 4, 0) != b"QFI\xfb":
        why = "it is no qcow2 image"
    if why:
        os.close(fd)
        raise InvalidInput(f"disk {disk.base_path}: {why}", reason="BAD_DISK", path=disk.base_path)
    return fd


def _open_file(path: str, what: str, reason: str) -> int:
    if not os.path.isabs(path):
        raise InvalidInput(f"{what} path {path!r} must be absolute", reason=reason, path=path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidInput(f"{what} {path}: {error.strerror}", reason=reason, path=path) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidInput(f"{what} {path} is not a regular file", reason=reason, path=path)
    return fd


def reopenable(fd: int, identity: Identity) -> int:
    """A descriptor with the same content that `identity` can open again by /dev/fd.

    QEMU opens kernel and initramfs by name, and opening /dev/fd/N checks the file's mode again. A
    file that is not readable by all is copied into a sealed memfd; `fd` itself is kept otherwise.
    """
    info = os.fstat(fd)
    if identity.uid in (0, info.st_uid) or info.st_mode & stat.S_IROTH:
        return fd
    copy = os.memfd_create("voidbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    remaining, offset = info.st_size, 0
    while remaining > 0 and (sent := os.sendfile(copy, fd, offset, remaining)):
        offset, remaining = offset + sent, remaining - sent
    os.close(fd)
    return copy


def open_mount(mount: Mount) -> int:
    """A descriptor of a mount's host directory or file.

    Raises:
        InvalidInput: missing, neither of both, or a path that is not absolute (reason `BAD_MOUNT`).
    """
    where = f"mount {mount.host_path}:{mount.guest_path}"
    for side in (mount.host_path, mount.guest_path):
        if not os.path.isabs(side):
            raise InvalidInput(f"{where}: {side!r} must be absolute", reason="BAD_MOUNT", path=side)
    if ".." in Path(mount.guest_path).parts or Path(mount.guest_path) == Path("/"):
        raise InvalidInput(
            f"{where}: the path in the box must not be '/' or hold '..'",
            reason="BAD_MOUNT",
            path=mount.guest_path,
        )
    try:
        fd = os.open(mount.host_path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidInput(
            f"{where}: {error.strerror} (on the hypervisor's host)", reason="BAD_MOUNT", path=mount.host_path
        ) from error
    kind = os.fstat(fd).st_mode
    if stat.S_ISDIR(kind) or (stat.S_ISREG(kind) and mount.mode is not MountMode.OVERLAY):
        return fd
    os.close(fd)
    if stat.S_ISREG(kind):
        what = "a file; only a directory can be an overlay"
    else:
        what = "neither a directory nor a regular file"
    raise InvalidInput(f"{where}: the host's path is {what}", reason="BAD_MOUNT", path=mount.host_path)


def machine_identity(mounts: Iterable[tuple[Mount, int]], fallback: Identity) -> tuple[Identity, bool]:
    """Who the machine runs as, and whether programs in the guest must be that same user.

    An unprivileged hypervisor has no choice. As root, the machine becomes the owner of what it
    shares, so that the host's permissions hold for the guest and new files belong to that owner.

    Args:
        mounts: The mounts, each with its open directory.
        fallback: Who it is if no mount decides.

    Raises:
        InvalidInput: directories of several owners, one of root's shared for writing, or one
            that the machine's user may not read (reason `BAD_MOUNT`).
    """
    opened = list(mounts)
    if os.geteuid() != 0:
        return fallback, bool(opened)
    owners: dict[int, Mount] = {}
    identity, mapped = fallback, False
    for mount, fd in opened:
        info = os.fstat(fd)
        if info.st_uid == 0 and mount.mode is MountMode.READ_WRITE:
            raise InvalidInput(
                f"mount {mount.host_path}:{mount.guest_path}:{mount.mode.value}: it belongs to root, and no "
                f"machine runs as root; use mode overlay, or give it to a user, e.g.: "
                f"chown -R 1000:1000 {mount.host_path}",
                reason="BAD_MOUNT",
                path=mount.host_path,
            )
        if info.st_uid != 0:
            owners[info.st_uid] = mount
            identity = Identity(info.st_uid, info.st_gid)
        # Of an overlay, root's files are shown as the machine's user's.
        mapped = mapped or (info.st_uid == 0 and mount.mode is MountMode.OVERLAY)
    if len(owners) > 1:
        named = ", ".join(f"{mount.host_path} (uid {uid})" for uid, mount in owners.items())
        raise InvalidInput(
            f"the mounted directories belong to different users: {named}; a box's machine runs as one user",
            reason="BAD_MOUNT",
        )
    for mount, fd in opened:
        info = os.fstat(fd)
        if mount.mode is MountMode.OVERLAY and info.st_uid == 0:
            continue
        if not _may_enter(info, identity):
            raise InvalidInput(
                f"mount {mount.host_path}:{mount.guest_path}: uid {identity.uid}, which the machine runs as, "
                f"may not read it; run: chmod o+rX {mount.host_path}",
                reason="BAD_MOUNT",
                path=mount.host_path,
            )
    return identity, bool(owners) or mapped


def _may_enter(info: os.stat_result, identity: Identity) -> bool:
    needed = 0o555 if stat.S_ISDIR(info.st_mode) else 0o444
    if info.st_uid == identity.uid:
        needed &= 0o700
    elif info.st_gid == identity.gid:
        needed &= 0o070
    else:
        needed &= 0o007
    return info.st_mode & needed == needed


def device_groups(info: os.stat_result) -> tuple[int, ...]:
    """The group that a machine of ours gets so that it may open a device; never root's."""
    return (info.st_gid,) if info.st_gid else ()


def check_device_access(path: str, identity: Identity) -> None:
    """Whether `identity` may open a device for reading and writing, by its mode.

    Raises:
        WrongState: the device is missing or not accessible; the message names the cure.
    """
    try:
        info = os.stat(path)
    except OSError as error:
        raise WrongState(f"{path}: {error.strerror}", reason="NO_DEVICE", path=path) from error
    if identity.uid == 0:
        return
    groups = {identity.gid, *(device_groups(info) if os.geteuid() == 0 else os.getgroups())}
    if info.st_uid == identity.uid:
        needed = 0o600
    elif info.st_gid in groups:
        needed = 0o060
    else:
        needed = 0o006
    if info.st_mode & needed != needed:
        raise WrongState(
            f"{path} (mode {stat.S_IMODE(info.st_mode):04o}, uid {info.st_uid}, gid {info.st_gid}) cannot be "
            f"opened by uid {identity.uid}, which machines run as; allow it, e.g.: chmod o+rw {path}",
            reason="NO_ACCESS",
            path=path,
        )
