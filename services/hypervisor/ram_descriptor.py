"""Lets a restored machine give memory back to the host, which QEMU alone cannot do safely.

A guest reports the pages that it has freed (virtio-balloon, free page reporting). QEMU then punches a hole
into the file of the RAM (`ram_block_discard_range`: fallocate(2), then madvise(2) with MADV_DONTNEED). For
a private mapping the second alone is right: it drops the machine's own copies. The first is meant for shared
ones; here it fails, since what others are restored from is sealed, and QEMU goes no further.

So the RAM's descriptor gets a number that is known before QEMU runs, and a seccomp filter answers the
punching of *that* descriptor with success. QEMU is told to take its RAM from a file that is not there,
so it makes one, as it makes no other (`file_ram_open`): O_RDWR, O_CREAT and O_EXCL with mode 0644. That
open(2) is handed to the shim (SECCOMP_RET_USER_NOTIF), which answers it with the RAM under the number
(SECCOMP_IOCTL_NOTIF_ADDFD, Linux 5.9) and is not asked again: later ones fail with ENOSYS. Whatever else QEMU
opens or punches, as it does in its disks, is not touched by this. seccomp_unotify(2).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import time

from services.hypervisor import seccomp
from services.hypervisor.seccomp import (
    BPF_JEQ_K,
    BPF_LD_W_ABS,
    BPF_RET_K,
    INSTRUCTION,
    OFFSET_ARCH,
    OFFSET_ARGS,
    OFFSET_NUMBER,
    RET_ALLOW,
)

PATH = "/proc/self/voidbox-ram"
"""There is no such file, and none can be made there."""
OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL
OPEN_MODE = 0o644
NUMBER = 1000
"""Far above what QEMU has open by then; once it is in use, nothing else can get it."""
ANSWER_SECONDS = 30.0
"""QEMU opens its memory some 40 ms after it is started; a busy host may need long."""

# linux/seccomp.h
_SET_MODE_FILTER = 1
_FLAG_NEW_LISTENER = 8
_RET_USER_NOTIF = 0x7FC00000
_RET_SUCCESS = 0x00050000  # SECCOMP_RET_ERRNO with errno 0: not done, but said to be
_NOTIF_RECV = 0xC0502100
_NOTIF_ADDFD = 0x40182103
_NOTIF_SEND = 0xC0182101
_NOTIFICATION_BYTES = 80
_ADDFD = struct.Struct("=QIIII")
_RESPONSE = struct.Struct("=QqiI")
_ADDFD_FLAG_SETFD = 1
# linux/falloc.h
PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FLPUNCH_HOLE | FALLOC_FL_KEEP_SIZE

SYSTEM_CALLS = {"x86_64": (257, 285, 317), "aarch64": (56, 47, 277)}
"""openat, fallocate and seccomp."""


class NotOpened(Exception):
    """QEMU did not open its memory as expected."""


def program(machine: str) -> bytes:
    """The filter as the kernel takes it, for a processor as uname(2) says it."""
    openat, fallocate, _ = SYSTEM_CALLS[machine]
    arch, _ = seccomp.table(machine)

    def argument(number: int) -> tuple[int, int, int, int]:
        return BPF_LD_W_ABS, 0, 0, OFFSET_ARGS + 8 * number

    code = [
        (BPF_LD_W_ABS, 0, 0, OFFSET_ARCH),
        (BPF_JEQ_K, 1, 0, arch),
        (BPF_RET_K, 0, 0, RET_ALLOW),
        (BPF_LD_W_ABS, 0, 0, OFFSET_NUMBER),
        (BPF_JEQ_K, 0, 6, openat),
        argument(2),
        (BPF_JEQ_K, 0, 3, OPEN_FLAGS),
        argument(3),
        (BPF_JEQ_K, 0, 1, OPEN_MODE),
        (BPF_RET_K, 0, 0, _RET_USER_NOTIF),
        (BPF_RET_K, 0, 0, RET_ALLOW),
        (BPF_JEQ_K, 0, 5, fallocate),
        argument(0),
        (BPF_JEQ_K, 0, 3, NUMBER),
        argument(1),
        (BPF_JEQ_K, 0, 1, PUNCH_HOLE),
        (BPF_RET_K, 0, 0, _RET_SUCCESS),
        (BPF_RET_K, 0, 0, RET_ALLOW),
    ]
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in code)


def install(report: socket.socket) -> None:
    """Put the filter on this process, which is about to become QEMU and has no_new_privs.

    Args:
        report: Takes the descriptor by which the open is answered, for `answer`.

    Raises:
        OSError: it cannot be put; EBUSY if whoever contains this process watches its calls already.
    """
    machine = os.uname().machine
    with seccomp.compiled(program(machine)) as fprog:
        libc = ctypes.CDLL(None, use_errno=True)
        listener = libc.syscall(
            ctypes.c_long(SYSTEM_CALLS[machine][2]), _SET_MODE_FILTER, _FLAG_NEW_LISTENER, fprog
        )
    if listener < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp listener: {os.strerror(code)}")
    socket.send_fds(report, [b"+"], [listener])
    os.close(listener)


def receive(report: socket.socket) -> int:
    """What `install` has sent.

    Raises:
        NotOpened: nothing.
    """
    data, fds, _, _ = socket.recv_fds(report, 1, 1)
    if not data or not fds:
        raise NotOpened("the machine's process did not say how its memory is handed to it")
    return fds[0]


def answer(listener: int, memory_fd: int, pidfd: int) -> None:
    """Give QEMU its memory when it opens it. Blocks until then, or until it has ended.

    Args:
        listener: From `receive`.
        memory_fd: The RAM.
        pidfd: QEMU's process.

    Raises:
        NotOpened: it has not within `ANSWER_SECONDS`.
    """
    deadline = time.monotonic() + ANSWER_SECONDS
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        ready = dict(poll.poll(left * 1000))
        if pidfd in ready:
            return  # its exit says why
        if not ready.get(listener, 0) & select.POLLIN:
            continue
        notification = bytearray(_NOTIFICATION_BYTES)
        try:
            fcntl.ioctl(listener, _NOTIF_RECV, notification)
            (call,) = struct.unpack_from("=Q", notification)
            add = _ADDFD.pack(call, _ADDFD_FLAG_SETFD, memory_fd, NUMBER, os.O_CLOEXEC)
            fcntl.ioctl(listener, _NOTIF_ADDFD, add)
            fcntl.ioctl(listener, _NOTIF_SEND, bytearray(_RESPONSE.pack(call, NUMBER, 0, 0)))
        except FileNotFoundError:  # ENOENT: the call was interrupted, and is made again
            continue
        return
    raise NotOpened(f"QEMU did not open its memory within {ANSWER_SECONDS:g} s")
