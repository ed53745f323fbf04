"""Claim: how an anonymous machine becomes one particular box."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from guest import boot, log, syscalls
from guest.arrival import wait_for
from guest.errors import AgentError, Code, invalid, not_found
from guest.root import Root
from guest.settings import Settings
from guest.users import with_sandbox, with_sandbox_group

_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\Z")
_OUR_HOSTS = re.compile(r"127\.0\.0\.1\tlocalhost [A-Za-z0-9-]+\n::1\tlocalhost\n")
_DIRECTORIES = (
    ("/proc", 0o555), ("/sys", 0o555), ("/dev", 0o755), ("/tmp", 0o1777), ("/run", 0o755), ("/etc", 0o755),  # noqa: S108
    ("/home", 0o755), ("/home/sandbox", 0o755), ("/workspace", 0o755), ("/root", 0o700),
)  # fmt: skip


class Identity(NamedTuple):
    """What the claim says about the box."""

    secret: bytes
    box_id: str
    hostname: str
    machine_id: bytes
    wall_clock_ns: int
    entropy: bytes
    uid: int
    gid: int
    groups: tuple[int, ...]
    disk: str
    disk_writable: bool
    env: dict[str, str]

    def validate(self) -> None:
        """Refuse what cannot be an identity.

        Raises:
            AgentError: INVALID_ARGUMENT, naming the field.
        """
        if len(self.secret) != 32:
            raise invalid(f"secret has {len(self.secret)} bytes, not 32")
        if self.hostname and not _LABEL.match(self.hostname):
            raise invalid(f"hostname {self.hostname!r} is not a DNS label")
        if self.machine_id and len(self.machine_id) != 16:
            raise invalid(f"machine_id has {len(self.machine_id)} bytes, not 16")
        if self.entropy and not 32 <= len(self.entropy) <= 512:
            raise invalid(f"entropy has {len(self.entropy)} bytes, not 32 to 512")
        if not 0 <= self.wall_clock_ns < 1 << 63:
            raise invalid("wall_clock is out of range")
        if not re.fullmatch(r"[A-Za-z0-9._-]{0,20}", self.disk):
            raise invalid(
                f"root_disk.serial {self.disk!r} is not a virtio serial (1 to 20 of [A-Za-z0-9._-])"
            )


class Confirmation(NamedTuple):
    """Which items of the claim are in force."""

    hostname: bool
    machine_id: bool
    clock: bool
    entropy: bool
    disk: bool


def apply(identity: Identity, settings: Settings, root: Root | None) -> tuple[Confirmation, Root]:
    """Put the identity in force and open the root that programs run in. Blocks.

    `root` is the one in use if the box has been claimed before: a disk is mounted once.

    On a machine that is not ours (a test) nothing of the machine is changed, and the
    confirmation says so.

    Raises:
        AgentError: the root disk cannot be mounted.
    """
    private = (settings.run_dir,)
    if not settings.guest:
        done = Confirmation(
            hostname=False, machine_id=False, clock=False, entropy=False, disk=not identity.disk
        )
        return done, root or Root(settings.files_root, private)
    clock = _attempt("clock", lambda: time.clock_settime_ns(time.CLOCK_REALTIME, identity.wall_clock_ns))
    entropy = len(identity.entropy) >= 32 and _attempt("entropy", lambda: _add_entropy(identity.entropy))
    hostname = bool(identity.hostname) and _attempt("hostname", lambda: socket.sethostname(identity.hostname))
    if identity.disk and (root is None or root.path != settings.root_disk):
        _mount_root_disk(identity, settings)
        # The disk's own tree is the programs' and callers' root: the agent's files are not in it.
        root = Root(settings.root_disk, ())
        _prepare_root_disk(identity, root)
    elif root is None:
        root = Root("/", private)
    machine_id = bool(identity.machine_id) and _attempt(
        "machine-id", lambda: _write_machine_id(identity, root)
    )
    _attempt("user", lambda: _make_user(identity, root))
    _attempt("hosts", lambda: _write_hosts(identity, root))
    for directory in ("/workspace", "/home/sandbox"):
        _attempt(f"owner of {directory}", functools.partial(_give, root, directory, identity))
    return Confirmation(
        hostname=hostname, machine_id=machine_id, clock=clock, entropy=entropy, disk=True
    ), root


def find_disk(serial: str) -> str:
    """The block device with this virtio serial; waits for one that is being plugged in. Blocks.

    Raises:
        AgentError: NOT_FOUND.
    """
    return wait_for(lambda: _find_disk(serial), lambda error: isinstance(error, AgentError))


def _find_disk(serial: str) -> str:
    for name in sorted(os.listdir("/sys/block")):
        try:
            with open(f"/sys/block/{name}/serial") as file:
                if file.read().strip("\0\n ") == serial:
                    return f"/dev/{name}"
        except OSError:
            continue
    raise not_found(f"no block device has the serial {serial!r}", reason="DISK_NOT_FOUND", serial=serial)


def _attempt(what: str, action: Callable[[], object]) -> bool:
    try:
        action()
    except OSError as error:
        log.error(f"claim: {what}: {error}")
        return False
    return True


def _add_entropy(seed: bytes) -> None:
    fd = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
    try:
        # struct rand_pool_info: bits of entropy, bytes in the buffer, the buffer (random(4)).
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def _mount_root_disk(identity: Identity, settings: Settings) -> None:
    boot.load_lazy(settings, "ext4")
    device = find_disk(identity.disk)
    target = settings.root_disk
    os.makedirs(target, exist_ok=True)
    if os.path.ismount(target):
        return  # an earlier claim got this far
    if identity.disk_writable:
        from guest.grow import fill_device  # most machines have no root disk

        _attempt("size of the root disk", lambda: fill_device(device))
    flags = syscalls.MS_NODEV | (0 if identity.disk_writable else syscalls.MS_RDONLY)
    try:
        syscalls.mount(device, target, "ext4", flags)
    except OSError as error:
        raise AgentError(
            Code.INTERNAL,
            "DISK_NOT_MOUNTED",
            f"cannot mount {device} as ext4: {error.strerror}",
            serial=identity.disk,
        ) from error


def _prepare_root_disk(identity: Identity, root: Root) -> None:
    """Add the directories that the disk lacks; what the image has stays as it is."""
    for path, mode in _DIRECTORIES:
        try:
            root.make_directories(path, 0, 0, mode)
        except (OSError, AgentError) as error:
            log.warning(f"root disk: cannot make {path}: {error}")
    for path in ("/proc", "/sys", "/dev"):
        # A link there would lead the mounts of the programs' namespace astray.
        if not stat.S_ISDIR(os.lstat(f"{root.path}{path}").st_mode):
            raise AgentError(
                Code.FAILED_PRECONDITION, "BAD_ROOT_DISK", f"{path} of the root disk is not a directory"
            )
    if identity.disk_writable:
        return
    for path, bits in (("/tmp", "1777"), ("/workspace", "0755"), ("/home/sandbox", "0755")):  # noqa: S108
        fd = root.open(path, os.O_PATH | os.O_DIRECTORY)
        try:
            flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
            syscalls.mount("tmpfs", f"/proc/self/fd/{fd}", "tmpfs", flags, f"mode={bits}")
        finally:
            os.close(fd)


def _give(root: Root, path: str, identity: Identity) -> None:
    fd = root.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fchown(fd, identity.uid, identity.gid)
    finally:
        os.close(fd)


def _write_machine_id(identity: Identity, root: Root) -> None:
    replace_file(root, "/etc/machine-id", identity.machine_id.hex() + "\n", 0o444)


def _make_user(identity: Identity, root: Root) -> None:
    if identity.uid == 0:
        return
    passwd = root.read_text("/etc/passwd")
    changed = with_sandbox(passwd, identity.uid, identity.gid)
    if changed != passwd:
        replace_file(root, "/etc/passwd", changed, 0o644)
    group = root.read_text("/etc/group")
    changed = with_sandbox_group(group, identity.gid)
    if changed != group:
        replace_file(root, "/etc/group", changed, 0o644)


def _write_hosts(identity: Identity, root: Root) -> None:
    """Give `localhost` and the host name an address, unless the image has its own file."""
    hosts = root.read_text("/etc/hosts")
    if identity.hostname and (not hosts.strip() or _OUR_HOSTS.fullmatch(hosts)):
        replace_file(root, "/etc/hosts", f"127.0.0.1\tlocalhost {identity.hostname}\n::1\tlocalhost\n", 0o644)


def replace_file(root: Root, path: str, text: str, mode: int) -> None:
    """Put a small file in place of another one, whole."""
    parent, name = root.open_parent(path)
    temporary = f".{name}.voidbox"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600, dir_fd=parent)
        try:
            os.write(fd, text.encode())
            os.fchmod(fd, mode)
        finally:
            os.close(fd)
        os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    finally:
        os.close(parent)
