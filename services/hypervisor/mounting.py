"""Mounts as descriptors: clones, attributes, and what a shared directory, file or overlay becomes.

Everything here is for a process in a mount namespace of its own, with the right to mount there.
Sources: open_tree(2), move_mount(2), mount_setattr(2), fsopen(2) (linux/mount.h for the commands of
fsconfig), Documentation/filesystems/overlayfs.rst. Imports nothing heavy: every start pays for it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
_ATTR_IDMAP = 0x100000
_NEWUSER = 0x10000000

_OPEN_TREE_CLONE, _AT_EMPTY_PATH, _AT_RECURSIVE, _AT_FDCWD = 1, 0x1000, 0x8000, -100
_MOVE_MOUNT_F_EMPTY_PATH = 4
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_CLOEXEC, _SET_FLAG, _SET_STRING, _CMD_CREATE = 1, 0, 1, 6

SHARED_FILE = "file"
"""The name of a file that is shared by itself, in the directory that is made for it."""
# Where something can be mounted for a moment; whatever was there is out of sight then.
WORKPLACES = ("/tmp", "/mnt", "/var/tmp", "/run")  # noqa: S108

_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """`result` of a call of the C library.

    Raises:
        OSError: it is negative; `what` begins the message.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, what: str, *arguments: object) -> int:
    """A system call that the C library may not have.

    Raises:
        OSError: it failed; `what` begins the message.
    """
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return check(int(_libc.syscall(ctypes.c_long(number), *words)), what)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    check(
        _libc.mount(
            source.encode() if source else None,
            os.fsencode(target),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            data.encode() or None,
        ),
        f"mount {target}",
    )


def workplace() -> str:
    """A directory that something may be mounted over."""
    return next(path for path in WORKPLACES if os.path.isdir(path))


def clone(path: str, fd: int = _AT_FDCWD, *, recursive: bool = True) -> int:
    """A copy, without a parent, of the mounts at and below `path`, or `fd` if that is empty."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    flags |= 0 if path else _AT_EMPTY_PATH
    return syscall(_SYS_OPEN_TREE, f"open_tree {path}", fd, os.fsencode(path), flags)


def set_attributes(tree: int, attributes: int, *, recursive: bool = True, users: int = 0) -> None:
    """Add attributes to the mount `tree`, and those below it; `users` is a user namespace for the mapping."""
    attr = (ctypes.c_uint64 * 4)(attributes, 0, 0, users)
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    syscall(_SYS_MOUNT_SETATTR, "mount_setattr", tree, b"", flags, ctypes.byref(attr), ctypes.sizeof(attr))


def attach(tree: int, target: str) -> None:
    """Mount `tree` at `target`, which is made, and close it."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if stat.S_ISDIR(os.fstat(tree).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    where = (_AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    syscall(_SYS_MOVE_MOUNT, f"move_mount {target}", tree, b"", *where)
    os.close(tree)


def share_directory(fd: int, *, read_only: bool) -> None:
    """Replace a directory's descriptor by one of a mount that has no parent.

    An inherited descriptor belongs to the mounts of whoever opened it, and `..` of it is the host.
    """
    tree = _clone_of(fd)
    set_attributes(tree, _attributes(read_only=read_only))
    _replace(fd, tree)


def share_file(fd: int, *, read_only: bool) -> None:
    """Replace a file's descriptor by one of a directory without a parent that holds it as `SHARED_FILE`."""
    tree = _clone_of(fd)
    set_attributes(tree, _attributes(read_only=read_only))
    base = workplace()
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0755,size=16k,nr_inodes=8")
    try:
        attach(tree, f"{base}/{SHARED_FILE}")
        whole = clone(base)
    finally:
        check(_libc.umount2(base.encode(), MNT_DETACH), f"umount {base}")
    set_attributes(whole, _attributes(read_only=True), recursive=False)
    _replace(fd, whole)


def share_overlay(fd: int, upper: int, work: int, owner: tuple[int, int] | None = None) -> None:
    """Replace a directory's descriptor by one of an overlay above it; closes `upper` and `work`.

    All changes go to `upper`. The overlay keeps its marks in user.* attributes, which it may set
    whoever mounts it, and which cannot be set through it.

    Args:
        owner: (uid, gid) that root's files in the directory seem to belong to; only root can ask for it.
    """
    context = syscall(_SYS_FSOPEN, "fsopen overlay", b"overlay", _CLOEXEC)
    layers = {"lowerdir": fd, "upperdir": upper, "workdir": work}
    opened = {name: _here(each) for name, each in layers.items()}
    covered = ""
    try:
        if owner is not None:
            covered = workplace()
            opened["lowerdir"] = _as_owner(opened["lowerdir"], owner, covered)
        for name, each in opened.items():
            path = f"/proc/self/fd/{each}".encode()
            syscall(_SYS_FSCONFIG, f"overlay's {name}", context, _SET_STRING, name.encode(), path, 0)
        syscall(_SYS_FSCONFIG, "overlay's attributes", context, _SET_FLAG, b"userxattr", None, 0)
        try:
            syscall(_SYS_FSCONFIG, "overlay", context, _CMD_CREATE, None, None, 0)
        except OSError as error:
            why = f"{error}; the file system of the state directory or the mount may not be fit for it"
            raise OSError(error.errno, why) from error
        tree = syscall(_SYS_FSMOUNT, "fsmount", context, _CLOEXEC, _attributes(read_only=False))
    finally:
        for each in (context, *opened.values()):
            os.close(each)
        if covered:
            check(_libc.umount2(covered.encode(), MNT_DETACH), f"umount {covered}")
    for each in (upper, work):
        os.close(each)
    _replace(fd, tree)


def _as_owner(directory: int, owner: tuple[int, int], place: str) -> int:
    """A directory as a mount in which root's files belong to `owner`; closes `directory`.

    It is attached for a moment, over a file system at `place`: before Linux 6.15 an overlay takes no
    layer that is attached nowhere.
    """
    tree = clone("", directory, recursive=False)
    os.close(directory)
    users = _user_namespace(*owner)
    try:
        set_attributes(tree, _ATTR_IDMAP, recursive=False, users=users)
    except OSError as error:
        why = f"root's files cannot be shown as the box's here ({error.strerror}); give them to a user"
        raise OSError(error.errno, why) from error
    finally:
        os.close(users)
    mount("tmpfs", place, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0755,size=16k,nr_inodes=8")
    attach(tree, f"{place}/lower")
    return os.open(f"{place}/lower", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _user_namespace(uid: int, gid: int) -> int:
    """A descriptor of a user namespace that maps root to these, for an id-mapped mount."""
    told, tell = os.pipe()
    wait, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(go)
            check(_libc.unshare(_NEWUSER), "unshare users")
            # Its number where /proc was mounted, which may be another process namespace.
            os.write(tell, os.readlink("/proc/self").encode())
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(tell)
    try:
        number = os.read(told, 32).decode()
        if not number:
            raise OSError(errno.EPERM, "no user namespace can be made for an id-mapped mount")
        for name, each in (("uid_map", uid), ("gid_map", gid)):
            with open(f"/proc/{number}/{name}", "w") as file:
                file.write(f"0 {each} 1")
        return os.open(f"/proc/{number}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for end in (told, wait, go):
            os.close(end)
        os.waitpid(pid, 0)


def _attributes(*, read_only: bool) -> int:
    return ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC | (ATTR_RDONLY if read_only else 0)


def _here(fd: int) -> int:
    """What `fd` refers to, opened in this mount namespace: another one's mounts cannot be cloned."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.samestat(os.fstat(found), os.fstat(fd)):
        os.close(found)
        raise OSError(errno.ESTALE, f"{path} is another file now")
    return found


def _clone_of(fd: int) -> int:
    found = _here(fd)
    try:
        return clone("", found)
    finally:
        os.close(found)


def _replace(fd: int, tree: int) -> None:
    os.dup2(tree, fd, inheritable=os.get_inheritable(fd))
    os.close(tree)
