"""What a fresh machine needs before the agent can run: file systems, modules, loopback."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from guest import log, syscalls
from guest.settings import Settings

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_EEXIST, _EBUSY = 17, 16

_NODEV = syscalls.MS_NOSUID | syscalls.MS_NODEV
_NOEXEC = _NODEV | syscalls.MS_NOEXEC

# (source, target, type, flags, data), in order.
FIRST_MOUNTS = (
    ("proc", "/proc", "proc", _NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", _NOEXEC, ""),
    ("devtmpfs", "/dev", "devtmpfs", syscalls.MS_NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", "devpts", syscalls.MS_NOSUID | syscalls.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/run", "tmpfs", _NODEV, "mode=0755"),
)
LATER_MOUNTS = (
    ("tmpfs", "/dev/shm", "tmpfs", _NODEV, "mode=1777"),  # noqa: S108
    ("tmpfs", "/tmp", "tmpfs", _NODEV, "mode=1777"),  # noqa: S108
    # Not in the rootfs, which holds the image in RAM: these have limits of their own.
    ("tmpfs", "/workspace", "tmpfs", _NODEV, "mode=0755"),
    ("tmpfs", "/home/sandbox", "tmpfs", _NODEV, "mode=0755"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", _NOEXEC, "nsdelegate"),
)

_PROGRAM_DEVICES = (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9))
_PROGRAM_LINKS = (
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
)


def mount_all(mounts: tuple[tuple[str, str, str, int, str], ...]) -> None:
    """Make each mount; one that is there already is fine, one that fails is logged."""
    for source, target, kind, flags, data in mounts:
        os.makedirs(target, exist_ok=True)
        try:
            syscalls.mount(source, target, kind, flags, data)
        except OSError as error:
            if error.errno != _EBUSY:  # the kernel has mounted devtmpfs itself
                log.error(f"cannot mount {kind} on {target}: {error.strerror}")


def load_modules(list_file: str) -> None:
    """Load the kernel modules that `list_file` names, one absolute path a line, in order."""
    try:
        with open(list_file) as file:
            paths = file.read().split()
    except FileNotFoundError:
        return  # built in
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                syscalls.finit_module(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno != _EEXIST:
                log.error(f"cannot load kernel module {path}: {error.strerror}")


def load_lazy(settings: Settings, name: str) -> None:
    """Load the modules that feature `name` needs, if they are not built in or loaded."""
    if settings.modules:
        load_modules(f"{settings.modules}/lazy/{name}")


def bring_up_loopback() -> None:
    """Set `lo` up; its addresses come by themselves."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def make_program_dev(settings: Settings) -> None:
    """Make the /dev that programs get: no disks, no memory, no kernel log."""
    dev = settings.program_dev
    os.makedirs(dev, exist_ok=True)
    syscalls.mount("tmpfs", dev, "tmpfs", syscalls.MS_NOSUID, "mode=0755,size=64k")
    for name, minor in _PROGRAM_DEVICES:
        os.mknod(f"{dev}/{name}", 0o20666, os.makedev(1, minor))
        os.chmod(f"{dev}/{name}", 0o666)  # noqa: S103
    os.mknod(f"{dev}/tty", 0o20666, os.makedev(5, 0))
    os.chmod(f"{dev}/tty", 0o666)  # noqa: S103
    for name, target in _PROGRAM_LINKS:
        os.symlink(target, f"{dev}/{name}")
    for name in ("pts", "shm"):
        os.mkdir(f"{dev}/{name}")
        syscalls.mount(f"/dev/{name}", f"{dev}/{name}", flags=syscalls.MS_BIND)


def make_directories() -> None:
    """Make what programs expect of a machine and the image may lack."""
    for path, mode in (
        ("/workspace", 0o755),
        ("/home/sandbox", 0o755),
        ("/root", 0o700),
        ("/var/tmp", 0o1777),  # noqa: S108
    ):
        if not os.path.isdir(path):
            os.makedirs(path, exist_ok=True)
            os.chmod(path, mode)
