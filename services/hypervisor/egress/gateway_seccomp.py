"""What a gateway may ask of the kernel: sockets of the Internet, pipes to splice by, memory, time, no more.

Everything else fails with EPERM instead of killing: a library that probes for a feature goes on without it.
No program is started, no process made, no file opened, no socket of another kind.
"""

from __future__ import annotations

import errno
import os
import socket

from services.hypervisor import seccomp
from services.hypervisor.seccomp import (
    BPF_JEQ_K,
    BPF_JSET_K,
    BPF_LD_W_ABS,
    BPF_RET_K,
    INSTRUCTION,
    OFFSET_ARCH,
    OFFSET_ARGS,
    OFFSET_NUMBER,
    PROT_EXEC,
    RET_ALLOW,
    RET_KILL_PROCESS,
)

_RET_EPERM = 0x00050000 | errno.EPERM

# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; -1: there is none.
_NUMBERS: dict[str, tuple[int, int]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "poll": (7, -1),
    "lseek": (8, 62), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "ioctl": (16, 29),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "nanosleep": (35, 101), "getpid": (39, 172),
    "connect": (42, 203), "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211),
    "recvmsg": (47, 212), "shutdown": (48, 210), "bind": (49, 200), "getsockname": (51, 204),
    "getpeername": (52, 205), "setsockopt": (54, 208), "getsockopt": (55, 209), "exit": (60, 93),
    "fcntl": (72, 25), "fsync": (74, 82), "sigaltstack": (131, 132), "gettid": (186, 178),
    "futex": (202, 98), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "epoll_wait": (232, -1), "epoll_ctl": (233, 21), "ppoll": (271, 73), "splice": (275, 76),
    "epoll_pwait": (281, 22), "accept4": (288, 242), "eventfd2": (290, 19), "epoll_create1": (291, 20),
    "pipe2": (293, 59), "getrandom": (318, 278), "epoll_pwait2": (441, 441), "rseq": (334, 293),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
}  # fmt: skip
_SOCKET, _MMAP = (41, 198), (9, 222)


def program(machine: str) -> bytes:
    """The BPF program as the kernel takes it, for a processor as uname(2) says it.

    Raises:
        SeccompUnavailable: there is no table for it.
    """
    arch, column = seccomp.table(machine)
    code = [
        (BPF_LD_W_ABS, 0, 0, OFFSET_ARCH),
        (BPF_JEQ_K, 1, 0, arch),
        (BPF_RET_K, 0, 0, RET_KILL_PROCESS),
        (BPF_LD_W_ABS, 0, 0, OFFSET_NUMBER),
    ]
    for numbers in _NUMBERS.values():
        if numbers[column] >= 0:
            code += [(BPF_JEQ_K, 0, 1, numbers[column]), (BPF_RET_K, 0, 0, RET_ALLOW)]
    code += [
        # A socket: IPv4 or IPv6 alone.
        (BPF_JEQ_K, 0, 5, _SOCKET[column]),
        (BPF_LD_W_ABS, 0, 0, OFFSET_ARGS),
        (BPF_JEQ_K, 2, 0, int(socket.AF_INET)),
        (BPF_JEQ_K, 1, 0, int(socket.AF_INET6)),
        (BPF_RET_K, 0, 0, _RET_EPERM),
        (BPF_RET_K, 0, 0, RET_ALLOW),
        # Memory that is not code.
        (BPF_JEQ_K, 0, 4, _MMAP[column]),
        (BPF_LD_W_ABS, 0, 0, OFFSET_ARGS + 16),
        (BPF_JSET_K, 0, 1, PROT_EXEC),
        (BPF_RET_K, 0, 0, _RET_EPERM),
        (BPF_RET_K, 0, 0, RET_ALLOW),
        (BPF_RET_K, 0, 0, _RET_EPERM),
    ]
    return b"".join(INSTRUCTION.pack(*each) for each in code)


def install() -> None:
    """Confine the calling process, which has one thread, for good.

    Raises:
        SeccompUnavailable: there is no table for this processor, or no seccomp in this kernel.
    """
    seccomp.put(program(os.uname().machine))
