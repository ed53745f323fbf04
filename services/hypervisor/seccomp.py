"""A seccomp allow list for the process that serves a machine's vsock device (seccomp(2), BPF).

The list is what the loop needs to move bytes between descriptors it already has, to wait for its
child, and to give memory back; everything else kills the process, and the machine with it. No file
can be opened, no program started, no process made, no new kind of socket created.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum

# linux/seccomp.h, linux/audit.h, linux/filter.h, linux/prctl.h
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
RET_KILL_PROCESS = 0x80000000
RET_ALLOW = 0x7FFF0000

BPF_LD_W_ABS = 0x20
BPF_JEQ_K = 0x15
BPF_JSET_K = 0x45
BPF_RET_K = 0x06

OFFSET_NUMBER = 0
OFFSET_ARCH = 4
OFFSET_ARGS = 16

INSTRUCTION = struct.Struct("=HBBI")
MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS."""

FIONBIO = 0x5421
PROT_EXEC = 0x4
MAP_ANONYMOUS = 0x20


class Profile(Enum):
    """What the loop does besides serving its descriptors."""

    DEVICE = "device"
    """Nothing."""
    RELAY = "relay"
    """It connects AF_VSOCK sockets."""


class SeccompUnavailable(Exception):
    """The kernel or the processor is not one this filter can be made for."""


# Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h. -1: the
# architecture does not have it.
_NUMBERS: Mapping[str, tuple[int, int]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigreturn": (15, 139),
    "ioctl": (16, 29),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "socket": (41, 198),
    "connect": (42, 203),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
    "exit": (60, 93),
    "wait4": (61, 260),
    "fsync": (74, 82),
    "futex": (202, 98),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "exit_group": (231, 94),
    "epoll_wait": (232, -1),
    "epoll_ctl": (233, 21),
    "waitid": (247, 95),
    "epoll_pwait": (281, 22),
    "accept4": (288, 242),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "pidfd_send_signal": (424, 424),
    "epoll_pwait2": (441, 441),
}

_ARCHITECTURES: Mapping[str, tuple[int, int]] = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""AUDIT_ARCH_* and the column of `_NUMBERS`."""

# What runs per packet comes first: the kernel takes the list in order.
_PLAIN = (
    "pwritev", "pread64", "pwritev2", "recvfrom", "sendto", "write", "epoll_wait", "epoll_pwait", "preadv",
    "preadv2", "pwrite64", "read", "recvmsg", "sendmsg", "epoll_ctl", "epoll_pwait2", "accept4", "shutdown",
    "close", "futex", "munmap", "mremap", "madvise", "brk", "clock_gettime", "rt_sigreturn",
    "restart_syscall", "getsockname", "getsockopt", "wait4",
    "waitid", "pidfd_send_signal", "fsync", "exit", "exit_group",
)  # fmt: skip


def program(machine: str, profile: Profile) -> bytes:
    """The BPF program as the kernel takes it.

    Args:
        machine: As uname(2) says it.
        profile: What to allow.

    Raises:
        SeccompUnavailable: there is no table for `machine`.
    """
    arch, column = table(machine)

    def number(name: str) -> int:
        return _NUMBERS[name][column]

    code = [
        (BPF_LD_W_ABS, 0, 0, OFFSET_ARCH),
        (BPF_JEQ_K, 1, 0, arch),
        (BPF_RET_K, 0, 0, RET_KILL_PROCESS),
        # x32 numbers carry bit 30 and so match nothing below.
        (BPF_LD_W_ABS, 0, 0, OFFSET_NUMBER),
    ]
    for name in _PLAIN:
        if number(name) >= 0:
            code += [(BPF_JEQ_K, 0, 1, number(name)), (BPF_RET_K, 0, 0, RET_ALLOW)]
    code += _when(number("ioctl"), [_equals(1, FIONBIO)])
    code += _when(number("mmap"), [_lacks(2, PROT_EXEC), _has(3, MAP_ANONYMOUS)])
    code += _when(number("mprotect"), [_lacks(2, PROT_EXEC)])
    if profile is Profile.RELAY:
        code += _when(number("socket"), [_equals(0, socket.AF_VSOCK)])
        code += _when(number("connect"), [])
    code.append((BPF_RET_K, 0, 0, RET_KILL_PROCESS))
    assert len(code) <= MAX_INSTRUCTIONS
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in code)


_Check = tuple[int, int, int, bool]
"""argument, jump, constant, whether a true test passes."""


def _equals(argument: int, value: int) -> _Check:
    return argument, BPF_JEQ_K, value, True


def _has(argument: int, bits: int) -> _Check:
    return argument, BPF_JSET_K, bits, True


def _lacks(argument: int, bits: int) -> _Check:
    return argument, BPF_JSET_K, bits, False


def _when(number: int, checks: list[_Check]) -> list[tuple[int, int, int, int]]:
    """Allow `number` if all checks pass, kill otherwise; fall through for other numbers.

    The lower half of an argument is what the kernel looks at for all that is checked here
    (`int`, `unsigned`, protection and mapping flags).
    """
    body: list[tuple[int, int, int, int]] = []
    for argument, jump, constant, good in checks:
        body.append((BPF_LD_W_ABS, 0, 0, OFFSET_ARGS + 8 * argument))
        body.append((jump, 1, 0, constant) if good else (jump, 0, 1, constant))
        body.append((BPF_RET_K, 0, 0, RET_KILL_PROCESS))
    body.append((BPF_RET_K, 0, 0, RET_ALLOW))
    return [(BPF_JEQ_K, 0, len(body), number), *body]


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def compiled(code: bytes) -> Iterator[ctypes._Pointer[_SockFprog]]:
    """A pointer to a program for the kernel, valid within the block."""
    buffer = ctypes.create_string_buffer(code, len(code))
    yield ctypes.pointer(_SockFprog(len(code) // INSTRUCTION.size, ctypes.addressof(buffer)))


def table(machine: str) -> tuple[int, int]:
    """AUDIT_ARCH_* of a processor as uname(2) says it, and its column in tables of call numbers.

    Raises:
        SeccompUnavailable: there is no table for it.
    """
    if machine not in _ARCHITECTURES:
        raise SeccompUnavailable(f"no system call table for {machine}; x86_64 and aarch64 have one")
    return _ARCHITECTURES[machine]


def prctl(option: int, *arguments: int | ctypes._Pointer[_SockFprog]) -> None:
    """Call prctl(2) with up to four arguments.

    Raises:
        OSError: it failed.
    """
    rest = [
        ctypes.c_ulong(argument) if isinstance(argument, int) else argument
        for argument in (*arguments, 0, 0, 0, 0)[:4]
    ]
    if _libc.prctl(ctypes.c_int(option), *rest) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")


def no_new_privileges() -> None:
    """No program that this process or a child runs gains privileges by it."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def install(profile: Profile) -> None:
    """Confine the calling process (it must have one thread) for good.

    Raises:
        SeccompUnavailable: there is no table for this processor, or no seccomp in this kernel.
    """
    put(program(os.uname().machine, profile))


def put(code: bytes) -> None:
    """Have the calling process, which has one thread, run under a program for good.

    Raises:
        SeccompUnavailable: there is no seccomp in this kernel.
    """
    no_new_privileges()
    try:
        with compiled(code) as fprog:
            prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, fprog)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            raise SeccompUnavailable("this kernel is built without seccomp filters") from error
        raise
