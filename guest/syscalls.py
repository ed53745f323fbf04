"""The few Linux calls that Python 3.11 has no function for, by ctypes.

`ctypes` is loaded once by PID 1 before it forks the agent, so both share it. Every
function raises `OSError` with the errno and, where there is one, the path.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC = 32, 4096, 8192, 16384
MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 18, 1 << 19, 1 << 20
MNT_DETACH = 2

CLONE_NEWNS = 0x00020000

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

REBOOT_POWER_OFF = 0x4321FEDC
REBOOT_RESTART = 0x01234567

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8

_SYS_OPENAT2 = 437  # the same on every architecture: asm-generic/unistd.h
_SYS_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}
_CAPABILITY_VERSION_3 = 0x20080522


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def _fail(path: str | bytes | None = None) -> OSError:
    number = ctypes.get_errno()
    return (
        OSError(number, os.strerror(number), path)
        if path is not None
        else OSError(number, os.strerror(number))
    )


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    done: int = _libc.mount(
        source.encode(),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    if done != 0:
        raise _fail(target)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    if _libc.umount2(os.fsencode(target), flags) != 0:
        raise _fail(target)


def openat2(path: str | bytes, *, dir_fd: int, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2), always with O_CLOEXEC: a new file descriptor."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    raw = os.fsencode(path)
    while True:
        fd: int = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2), dir_fd, raw, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))
        )
        if fd >= 0:
            return fd
        # EAGAIN: a rename or mount raced with the walk (openat2(2)); EINTR as ever.
        if ctypes.get_errno() not in (4, 11):
            raise _fail(path)


def finit_module(fd: int, options: str = "") -> None:
    """finit_module(2)."""
    number = _SYS_FINIT_MODULE[os.uname().machine]
    if _libc.syscall(ctypes.c_long(number), fd, options.encode(), 0) != 0:
        raise _fail()


def prctl(option: int, value: int, third: int = 0) -> int:
    """prctl(2) with integer arguments."""
    result: int = _libc.prctl(
        option, ctypes.c_ulong(value), ctypes.c_ulong(third), ctypes.c_ulong(0), ctypes.c_ulong(0)
    )
    if result < 0:
        raise _fail()
    return result


def unshare(flags: int) -> None:
    """unshare(2)."""
    if _libc.unshare(flags) != 0:
        raise _fail()


def setns(fd: int, kind: int) -> None:
    """setns(2)."""
    if _libc.setns(fd, kind) != 0:
        raise _fail()


def drop_bounding_set() -> None:
    """Empty the bounding and ambient capability sets of this process; needs CAP_SETPCAP."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == 22:  # EINVAL: past the kernel's last capability
                break
            raise
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)


def drop_capabilities() -> None:
    """Empty the effective, permitted and inheritable capability sets of this process."""
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    if _libc.capset(ctypes.byref(header), (ctypes.c_uint32 * 6)()) != 0:
        raise _fail()


def reboot(how: int) -> None:
    """reboot(2); with REBOOT_POWER_OFF it does not return."""
    if _libc.reboot(ctypes.c_int(how)) != 0:
        raise _fail()


def mallopt(parameter: int, value: int) -> None:
    """mallopt(3); a hint, so a libc without it is fine."""
    function = getattr(_libc, "mallopt", None)
    if function is not None:
        function(parameter, value)
