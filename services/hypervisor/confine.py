"""What a machine's process may reach on the host: namespaces, a root of its own, Landlock.

A machine gets network, mount, process, IPC and host name namespaces of its own; its root holds the
system's programs and libraries, a /dev of four harmless nodes (and /dev/kvm) and its own /proc,
all read-only. Directories that it inherits become mounts that end at themselves, so that `..`
leads nowhere, and are read-only unless said otherwise. Landlock repeats this by file and also
denies TCP, abstract sockets and signals. Where the host gives only part of it, `probe` says so.

Steps, in the process that becomes the machine: `unshare` (its parent, before the fork),
`change_root`, `drop_privileges`, `restrict`. Sources: mount_namespaces(7), user_namespaces(7),
mount_setattr(2), open_tree(2), landlock(7). Imports nothing heavy: every start pays for it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Collection, Iterable
from typing import Literal

from services.hypervisor.mounting import (
    ATTR_NODEV,
    ATTR_NOEXEC,
    ATTR_NOSUID,
    ATTR_RDONLY,
    MNT_DETACH,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    attach,
    check,
    clone,
    mount,
    set_attributes,
    share_directory,
    share_file,
    share_overlay,
    syscall,
    workplace,
)

Namespaces = Literal["", "root", "user"]
"""None; made by root; made by anybody, in a user namespace."""

_NEWNS, _NEWUTS, _NEWIPC = 0x20000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000

_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/alternatives")
_SYSTEM_FILES = ("/etc/ld.so.cache",)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522

# linux/landlock.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REMOVE, _MAKE, _REFER, _TRUNCATE, _IOCTL_DEV = 0x30, 0x17C0, 1 << 13, 1 << 14, 1 << 15
_ALL_OF_ABI = {2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}
_ALL = 0xFFFF  # from ABI 5 on
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NET_ALL, _SCOPE_ALL = 3, 3  # bind and connect TCP (ABI 4); abstract sockets and signals (ABI 6)

_libc = ctypes.CDLL(None, use_errno=True)


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32))


def unshare(namespaces: Namespaces) -> None:
    """Give this process, which has one thread, and its children network, IPC and host name of their own.

    Its next child is the first in a process namespace; when it ends, all in there are killed.

    Raises:
        OSError: the host does not allow it.
    """
    if not namespaces:
        return
    uid, gid = os.geteuid(), os.getegid()
    flags = _NEWNET | _NEWIPC | _NEWUTS | _NEWPID | (_NEWUSER if namespaces == "user" else 0)
    check(_libc.unshare(flags), "unshare")
    if namespaces == "user":
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def change_root(
    program: str,
    fds: Iterable[int],
    writable: Collection[int],
    devices: Iterable[str] = (),
    files: Collection[int] = (),
    overlays: Collection[tuple[int, int, int]] = (),
    rooted: Collection[int] = (),
    owner: tuple[int, int] | None = None,
) -> None:
    """Move this process into a mount namespace whose root holds what a machine needs, and nothing else.

    Args:
        program: The machine's program; its installation is made visible.
        fds: Descriptors that it inherits; directories among them are replaced in place.
        writable: Those directories that may be written.
        devices: Device files besides the usual ones.
        files: Files among `fds`, each of which becomes a directory that holds it.
        overlays: Directories among `fds` that become overlays, with their upper and work directories.
        rooted: Those of them whose files of root's seem to be `owner`'s, who is (uid, gid).

    Raises:
        OSError: the host does not allow it.
    """
    check(_libc.unshare(_NEWNS), "unshare mounts")
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    for layers in overlays:
        share_overlay(*layers, owner if layers[0] in rooted else None)
    for fd in fds:
        if fd in files:
            share_file(fd, read_only=fd not in writable)
        elif fd not in [layers[0] for layers in overlays] and stat.S_ISDIR(os.fstat(fd).st_mode):
            share_directory(fd, read_only=fd not in writable)
    # Opened before the new root covers the place where it is made.
    trees = {path: clone(path) for path in _existing((*_system(program), *_SYSTEM_FILES))}
    nodes = {path: clone(path) for path in _existing((*_DEVICES, *devices))}
    links = {path: os.readlink(path) for path in _system(program) if os.path.islink(path)}
    base = workplace()
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=64k")
    for path, tree in trees.items():
        set_attributes(tree, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
        attach(tree, f"{base}{path}")
    for path, tree in nodes.items():
        attach(tree, f"{base}{path}")
    for path, target in links.items():
        os.symlink(target, f"{base}{path}")
    os.symlink("/proc/self/fd", f"{base}/dev/fd")
    _give_proc(f"{base}/proc")
    os.chdir(base)
    syscall(_SYS_PIVOT_ROOT[os.uname().machine], "pivot_root", b".", b".")
    check(_libc.umount2(b".", MNT_DETACH), "umount the host's root")
    os.chdir("/")
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    set_attributes(root, ATTR_RDONLY, recursive=False)
    os.close(root)


def _system(program: str) -> tuple[str, ...]:
    real = os.path.realpath(program)
    if real.startswith(tuple(f"{one}/" for one in _SYSTEM)):
        return _SYSTEM
    # /opt/qemu/bin/qemu-system-x86_64 has its firmware in /opt/qemu/share.
    return (*_SYSTEM, os.path.dirname(os.path.dirname(real)))


def _existing(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if os.path.lexists(path) and not os.path.islink(path)]


def _give_proc(target: str) -> None:
    os.mkdir(target)
    try:
        mount("proc", target, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except PermissionError:
        # A container hides parts of its /proc, and then no other one may be mounted in a user
        # namespace. Processes of the host can be listed then; Landlock keeps them from being read.
        tree = clone("/proc")
        set_attributes(tree, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC)
        attach(tree, target)


def drop_privileges(uid: int | None, gid: int | None, groups: Collection[int]) -> None:
    """Become this user, if one is given, and give up all capabilities, also those of programs to come.

    Raises:
        OSError: only root can become somebody else.
    """
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, *map(ctypes.c_ulong, (capability, 0, 0, 0))) != 0:
            break  # past the last one (EINVAL), or we have none to begin with (EPERM)
    if uid is not None and gid is not None and os.geteuid() == 0:
        os.setgroups(list(groups))
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    _libc.prctl(_PR_CAP_AMBIENT, *map(ctypes.c_ulong, (_PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)))
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    check(_libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())), "capset")


def no_new_privileges() -> None:
    """No program that this process or a child runs gains privileges by it; Landlock asks for it."""
    check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))), "no_new_privs")


def landlock_abi() -> int:
    """The kernel's version of Landlock; 0 if it has none, or one that moves no file (before 5.19)."""
    version = int(_libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), 1))
    return version if version >= 2 else 0


def restrict(
    program: str, fds: Iterable[int], writable: Collection[int], devices: Collection[str] = ()
) -> None:
    """Restrict this process, which has no_new_privs, to the same files by Landlock.

    Args:
        program: The machine's program.
        fds: Descriptors that it inherits; what they name may be opened again.
        writable: Those that may be opened for writing, or written below.
        devices: Device files besides the usual ones.

    Raises:
        OSError: the kernel cannot do it.
    """
    abi = landlock_abi()
    if not abi:
        raise OSError(errno.EOPNOTSUPP, "this kernel has no Landlock (5.19 or newer)")
    handled = _ALL_OF_ABI.get(abi, _ALL)
    attr = (ctypes.c_uint64 * 3)(handled, _NET_ALL, _SCOPE_ALL)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = syscall(_CREATE_RULESET, "landlock_create_ruleset", ctypes.byref(attr), size, 0)
    read = _READ_FILE | _READ_DIR
    own = os.path.ismount("/proc") and os.readlink("/proc/self") == "1"
    for path in (*_system(program), *_SYSTEM_FILES, "/proc" if own else "/proc/self"):
        _allow_path(ruleset, path, handled & (read | _EXECUTE))
    for path in (*_DEVICES, *devices):
        _allow_path(ruleset, path, handled & (_READ_FILE | _WRITE_FILE | _IOCTL_DEV))
    for fd in fds:
        change = _WRITE_FILE | _TRUNCATE | _REMOVE | _MAKE | _REFER if fd in writable else 0
        _allow(ruleset, fd, handled & (read | change))
    syscall(_RESTRICT_SELF, "landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def deny_files() -> None:
    """Have Landlock deny this process, which has no_new_privs, all files; nothing happens without Landlock.

    Raises:
        OSError: the kernel cannot do it.
    """
    abi = landlock_abi()
    if abi:
        attr = (ctypes.c_uint64 * 3)(_ALL_OF_ABI.get(abi, _ALL), 0, _SCOPE_ALL)
        size = 24 if abi >= 6 else 16 if abi >= 4 else 8
        ruleset = syscall(_CREATE_RULESET, "landlock_create_ruleset", ctypes.byref(attr), size, 0)
        syscall(_RESTRICT_SELF, "landlock_restrict_self", ruleset, 0)
        os.close(ruleset)


def _allow_path(ruleset: int, path: str, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _allow(ruleset, fd, access)
    finally:
        os.close(fd)


def _allow(ruleset: int, fd: int, access: int) -> None:
    mode = os.fstat(fd).st_mode
    if not stat.S_ISDIR(mode):
        if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
            return  # a socket or pipe is not opened again
        access &= _FILE_RIGHTS
    rule = _Beneath(access, fd)
    try:
        syscall(_ADD_RULE, "landlock_add_rule", ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    except OSError as error:
        if error.errno != errno.EBADFD:  # a memfd: Landlock does not look at those
            raise
