"""The mount namespace that programs live in, made once by a short-lived child of PID 1.

It is a slave of the agent's: what the agent mounts later appears there, nothing comes
back. Programs see no agent files, no disks, and only the harmless part of /dev; the
writable switches of /proc and /sys are read-only, which matters for programs that run
as uid 0 without capabilities.
"""

from __future__ import annotations

import os

from guest import syscalls
from guest.settings import AGENT_ID, Settings

_RO_BIND = syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY
# The agent, PID 1 and other users' programs are not even seen (proc(5)); members of the group, by
# default 0, would see them.
_OWN_PROCESSES = f"hidepid=2,gid={AGENT_ID}"
_NOEXEC = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
_READ_ONLY = (
    "/proc/sys",
    "/proc/sysrq-trigger",
    "/proc/irq",
    "/proc/bus",
    "/proc/fs",
    "/sys",
    "/sys/fs/cgroup",
)
_HIDDEN_FILES = ("/proc/kcore", "/proc/kmsg", "/proc/keys", "/proc/kallsyms", "/proc/vmcore")
_HIDDEN_DIRECTORIES = ("/usr/lib/voidbox", "/lib/modules", "/sys/firmware")


def enter_program_namespace(settings: Settings, root: str) -> None:
    """Move this process into a new namespace whose root is `root` as programs see it.

    Args:
        settings: Where the agent's things are.
        root: Mount point of the root disk, or "" for the guest image itself.

    Raises:
        OSError: a mount failed; the namespace is of no use then.
    """
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("", "/", flags=syscalls.MS_REC | syscalls.MS_SLAVE)
    syscalls.mount(settings.program_dev, f"{root}/dev", flags=syscalls.MS_BIND | syscalls.MS_REC)
    if root:
        syscalls.mount("proc", f"{root}/proc", "proc", _NOEXEC, _OWN_PROCESSES)
        syscalls.mount("sysfs", f"{root}/sys", "sysfs", _NOEXEC | syscalls.MS_RDONLY)
        os.chdir(root)
        # pivot_root refuses to replace the rootfs of an initramfs; moving over it is the way.
        syscalls.mount(".", "/", flags=syscalls.MS_MOVE)
        os.chroot(".")
        os.chdir("/")
    else:
        syscalls.mount("proc", "/proc", "proc", _NOEXEC, _OWN_PROCESSES)
        _hide_directory(settings.run_dir)
        for path in _HIDDEN_DIRECTORIES:
            _hide_directory(path)
    for path in _HIDDEN_FILES if root else (*_HIDDEN_FILES, "/init"):
        if os.path.exists(path):
            syscalls.mount("/dev/null", path, flags=syscalls.MS_BIND)
    for path in _READ_ONLY:
        if not os.path.exists(path):
            continue
        if not os.path.ismount(path):
            syscalls.mount(path, path, flags=syscalls.MS_BIND)
        flags = _NOEXEC if path.startswith(("/proc", "/sys")) else 0
        syscalls.mount("", path, flags=_RO_BIND | flags)


def _hide_directory(path: str) -> None:
    if os.path.isdir(path):
        syscalls.mount("tmpfs", path, "tmpfs", _NOEXEC | syscalls.MS_RDONLY, "mode=0555,size=4k")
