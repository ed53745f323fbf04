"""The seccomp filter of every program (seccomp(2)): a list of what no workload needs.

The machine is the boundary; the filter keeps a program away from the parts of the guest's
kernel that are most often the way to more. It fails calls instead of killing, as most programs
have another way: EPERM, or ENOSYS where libraries fall back only on that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

# linux/seccomp.h, linux/audit.h, linux/filter.h, linux/prctl.h
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_SET, _AND, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_X32 = 0x40000000
_INSTRUCTION = struct.Struct("=HBBI")

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; -1: has none.
_REFUSED = {
    # What the root of a program is made of.
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "setns": (308, 268),
    "swapon": (167, 224), "swapoff": (168, 225), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "acct": (163, 89), "open_by_handle_at": (304, 265), "lookup_dcookie": (212, 18),
    # The kernel itself.
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "syslog": (103, 116),
    "reboot": (169, 142), "iopl": (172, -1), "ioperm": (173, -1), "uselib": (134, -1),
    "create_module": (174, -1), "nfsservctl": (180, 42), "vhangup": (153, 58),
    "sethostname": (170, 161), "setdomainname": (171, 162),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    # Keyrings, which are shared by all programs of a user, and other processes.
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
}  # fmt: skip
# io_uring makes sockets and opens files where no filter looks; clone3's flags lie in memory, where
# no filter can look.
_MISSING = {
    "clone3": (435, 435), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}  # fmt: skip
_MEMFD_CREATE, _MEMFD_SECRET = (319, 279), (447, 447)
_CLONE, _UNSHARE, _SOCKET, _IOCTL = (56, 220), (272, 97), (41, 198), (16, 29)

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; for unshare also NEWTIME.
_NAMESPACES, _NEWTIME = 0x7E020000, 0x80
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_STREAM, _DGRAM, _TYPE = 1, 2, 0xF  # linux/net.h: SOCK_TYPE_MASK
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

_libc = ctypes.CDLL(None, use_errno=True)
# Numbers are compared in order, in chunks that are passed over whole: the kernel runs the filter once
# for each system call when it is installed, which a guest under emulation pays for at every exec.
_CHUNK = 8
_Code = list[tuple[int, int, int, int]]


def program(machine: str, *, memfd: bool) -> bytes:
    """The filter as the kernel takes it; empty if there is no table for `machine`.

    Args:
        machine: As uname(2) says it.
        memfd: Whether files without a name may be made. They can be executed, and Landlock does
            not see them, so not where a list says what may be.
    """
    if machine not in _ARCHITECTURES:
        return b""
    arch, column = _ARCHITECTURES[machine]
    code: _Code = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_SET, 0, 1, _X32),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    bodies = {numbers[column]: _fail(errno.EPERM) for numbers in _REFUSED.values()}
    bodies |= {numbers[column]: _fail(errno.ENOSYS) for numbers in _MISSING.values()}
    if not memfd:
        bodies |= {_MEMFD_CREATE[column]: _fail(errno.EPERM), _MEMFD_SECRET[column]: _fail(errno.EPERM)}
    bodies |= {
        _CLONE[column]: _refuse_bits(0, _NAMESPACES),
        _UNSHARE[column]: _refuse_bits(0, _NAMESPACES | _NEWTIME),
        _IOCTL[column]: _refuse_values(1, _TIOCSTI) + _refuse_values(1, _TIOCLINUX),
        _SOCKET[column]: _sockets(),
    }
    bodies.pop(-1, None)
    numbers = sorted(bodies)
    for start in range(0, len(numbers), _CHUNK):
        chunk = numbers[start : start + _CHUNK]
        block: _Code = []
        for number in chunk:
            body = [*bodies[number], (_RETURN, 0, 0, _ALLOW)]
            block += [(_JUMP_EQUAL, 0, len(body), number), *body]
        block.append((_RETURN, 0, 0, _ALLOW))
        code += [(_JUMP_GREATER, len(block), 0, chunk[-1]), *block]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(_INSTRUCTION.pack(*one) for one in code)


def _fail(code: int) -> _Code:
    return [(_RETURN, 0, 0, _ERRNO | code)]


def _argument(number: int) -> tuple[int, int, int, int]:
    # The lower half: flags, ints and ioctl numbers are 32 bits wide where the kernel looks at them.
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * number)


def _refuse_bits(argument: int, bits: int) -> _Code:
    return [_argument(argument), (_JUMP_SET, 0, 1, bits), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]


def _refuse_values(argument: int, value: int) -> _Code:
    return [_argument(argument), (_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]


def _sockets() -> _Code:
    """Unix; TCP and UDP; routing netlink, which getaddrinfo asks. No raw, packet, vsock and others."""
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT)
    allow = (_RETURN, 0, 0, _ALLOW)
    # Jumps count from the next instruction; 7 to 10 judge netlink's protocol, 11 to 16 the type.
    return [
        _argument(0),
        (_JUMP_EQUAL, 0, 1, _UNIX),
        allow,
        (_JUMP_EQUAL, 3, 0, _NETLINK),
        (_JUMP_EQUAL, 6, 0, _INET),
        (_JUMP_EQUAL, 5, 0, _INET6),
        refuse,
        _argument(2),
        (_JUMP_EQUAL, 0, 1, 0),
        allow,
        refuse,
        _argument(1),
        (_AND, 0, 0, _TYPE),
        (_JUMP_EQUAL, 1, 0, _STREAM),
        (_JUMP_EQUAL, 0, 1, _DGRAM),
        allow,
        # As a user without the right to it hears it: programs such as ping then use a datagram socket.
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


_made: dict[bool, bytes] = {}


def prepare() -> None:
    """Make the filters now, so that what is forked later has them."""
    for memfd in (True, False):
        _made[memfd] = program(os.uname().machine, memfd=memfd)


def install(*, memfd: bool) -> None:
    """Put this process, which must have no_new_privs, under the filter for good.

    Raises:
        OSError: the kernel has no seccomp, or there is no table for this processor.
    """
    if not _made:
        prepare()
    code = _made[memfd]
    if not code:
        raise OSError(errno.ENOSYS, f"there is no table of system calls for {os.uname().machine}")
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = _Program(len(code) // _INSTRUCTION.size, ctypes.addressof(buffer))
    done: int = _libc.prctl(
        _PR_SET_SECCOMP,
        ctypes.c_ulong(_MODE_FILTER),
        ctypes.byref(filter_),
        ctypes.c_ulong(0),
        ctypes.c_ulong(0),
    )
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
