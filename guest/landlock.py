"""Landlock: what a program and all that it starts may execute (landlock(7), kernel 5.19 and newer).

Rights go with files, not names: a program of many names (busybox) is allowed with all of them. A
loader that may run maps what it may read, so `ld.so FILE` is not refused where anything needs ld.so.
"""

from __future__ import annotations

import ctypes
import errno
import os

# linux/landlock.h; the system calls have the same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_RULE_PATH_BENEATH = 1
_EXECUTE, _REFER = 1 << 0, 1 << 13
_ELF_MAGIC = b"\x7fELF"
_PT_INTERP = 3
_HEAD = 4096

_libc = ctypes.CDLL(None, use_errno=True)


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32))


def abi() -> int:
    """The kernel's version of Landlock; 0 if it has none."""
    return max(0, int(_libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), _VERSION)))


def restrict(allowed: list[str], search: str) -> None:
    """Put this process, which must have no_new_privs, into a domain of its own.

    Args:
        allowed: Names looked up on `search`, absolute paths of programs, and absolute paths of
            directories, all below which may be executed. The loaders that the programs name
            (PT_INTERP) are allowed too, the interpreters of scripts are not.
        search: Directories separated by colons.

    Raises:
        OSError: the kernel cannot do it (EOPNOTSUPP).
    """
    if abi() < 2:  # 5.19: without REFER no file could be moved between directories
        raise OSError(errno.EOPNOTSUPP, "the guest's kernel has no Landlock (lsm=landlock, 5.19 or newer)")
    handled = ctypes.c_uint64(_REFER | _EXECUTE)
    ruleset: int = _libc.syscall(
        ctypes.c_long(_CREATE_RULESET), ctypes.byref(handled), ctypes.c_size_t(ctypes.sizeof(handled)), 0
    )
    if ruleset < 0:
        raise _fail("landlock_create_ruleset")
    try:
        _allow(ruleset, "/", _REFER)
        for path in executables(allowed, search):
            _allow(ruleset, path, _EXECUTE)
        if _libc.syscall(ctypes.c_long(_RESTRICT_SELF), ruleset, 0) != 0:
            raise _fail("landlock_restrict_self")
    finally:
        os.close(ruleset)


def executables(allowed: list[str], search: str) -> list[str]:
    """The existing paths that a list means, loaders included."""
    found: dict[str, None] = {}
    for entry in allowed:
        directories = [""] if entry.startswith("/") else [f"{each}/" for each in search.split(":") if each]
        for directory in directories:
            path = f"{directory}{entry}"
            if os.path.exists(path):
                found[path] = None
                if loader := _loader(path):
                    found[loader] = None
    return list(found)


def _loader(path: str) -> str:
    """The loader that an ELF program names; empty if it is none or needs none (elf(5))."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        head = os.pread(fd, _HEAD, 0)
        if head[:5] != _ELF_MAGIC + b"\x02":
            return ""
        start, size = int.from_bytes(head[32:40], "little"), int.from_bytes(head[54:56], "little")
        for number in range(min(int.from_bytes(head[56:58], "little"), 64)):
            entry = os.pread(fd, 56, start + number * size)
            if int.from_bytes(entry[:4], "little") == _PT_INTERP:
                offset = int.from_bytes(entry[8:16], "little")
                length = min(int.from_bytes(entry[32:40], "little"), _HEAD)
                return os.pread(fd, length, offset).rstrip(b"\0").decode()
    except (OSError, UnicodeDecodeError, OverflowError):
        pass  # a directory or a broken file: nothing that the kernel would load
    finally:
        os.close(fd)
    return ""


def _allow(ruleset: int, path: str, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = _Beneath(access, fd)
        if (
            _libc.syscall(ctypes.c_long(_ADD_RULE), ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0) != 0
            # A file of a kernel-internal file system is nothing that a program can be.
            and ctypes.get_errno() != errno.EBADFD
        ):
            raise _fail(f"landlock_add_rule {path}")
    finally:
        os.close(fd)


def _fail(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


__all__ = ["abi", "executables", "restrict"]
