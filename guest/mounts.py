"""Shares and disks that the hypervisor has attached, mounted where programs see them. Blocks."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from guest import boot, identity, syscalls
from guest.arrival import wait_for
from guest.errors import AgentError, Code, from_os_error, invalid, not_found
from guest.root import Root, check
from guest.settings import Settings

READ_ONLY, READ_WRITE, OVERLAY = 1, 2, 3  # voidbox.common.v1.MountMode
SHARE_9P, SHARE_VIRTIOFS, DISK = 1, 2, 3  # guest.proto: MountType

# access=any: one attach for all users, the server is one user anyway. cache=mmap: without it a
# shared writable mapping (SQLite, git) fails. msize: the most that 128 descriptors carry.
_OPTIONS_9P = "trans=virtio,version=9p2000.L,msize=512000,access=any,cache=mmap"
_FORBIDDEN = ("/proc", "/sys", "/dev")
_SAFE = syscalls.MS_NOSUID | syscalls.MS_NODEV


class Mounts:
    """What was mounted, by path."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._mounted: dict[str, list[str]] = {}
        self._count = 0

    def mount(
        self, root: Root, source: str, kind: int, path: str, mode: int, owner: tuple[int, int], file: str = ""
    ) -> None:
        """Mount `source`, or the one `file` in it, at `path`, which is made if missing, for `owner`.

        Raises:
            AgentError: there is no such device, or it cannot be mounted there.
        """
        check(path)
        path = "/" + "/".join(part for part in path.split("/") if part)
        if path == "/" or any(path == one or path.startswith(one + "/") for one in _FORBIDDEN):
            raise invalid(f"nothing can be mounted at {path}", reason="BAD_MOUNT_PATH", path=path)
        if path in self._mounted:
            raise AgentError(
                Code.ALREADY_EXISTS, "MOUNTED", f"something is mounted at {path} already", path=path
            )
        if mode not in (0, READ_ONLY, READ_WRITE, OVERLAY):
            raise invalid(f"mount mode {mode}", path=path)
        if not source or "," in source:
            raise invalid(f"{source!r} is not the name of a device", reason="BAD_MOUNT_SOURCE")
        if file:
            if "/" in file or file in (".", "..") or mode == OVERLAY:
                raise invalid(f"{file!r} cannot be mounted by itself", reason="BAD_MOUNT_SOURCE")
            self._mounted[path] = self._file(root, source, kind, path, mode, owner, file)
            return
        try:
            root.make_directories(path, *owner, 0o755)
            target = root.open(path, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise from_os_error(error, path) from error
        try:
            if mode == OVERLAY:
                self._mounted[path] = self._overlay(source, kind, f"/proc/self/fd/{target}", path)
            else:
                flags = _SAFE | (0 if mode == READ_WRITE else syscalls.MS_RDONLY)
                self._attach(source, kind, f"/proc/self/fd/{target}", flags, path)
                self._mounted[path] = []
                if kind == DISK and mode == READ_WRITE:
                    _give_if_empty(root, path, owner)
        finally:
            os.close(target)

    def unmount(self, root: Root, path: str) -> None:
        """Undo `mount`.

        Raises:
            AgentError: nothing was mounted there, or it is in use.
        """
        check(path)
        path = "/" + "/".join(part for part in path.split("/") if part)
        if path not in self._mounted:
            raise not_found(f"Mount has mounted nothing at {path}", reason="NOT_MOUNTED", path=path)
        fd = root.open(path, os.O_PATH)
        try:
            real = os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        try:
            syscalls.umount(real)
        except OSError as error:
            raise from_os_error(error, path) from error
        for below in self._mounted.pop(path):
            with contextlib.suppress(OSError):
                syscalls.umount(below, syscalls.MNT_DETACH)

    def _file(
        self, root: Root, source: str, kind: int, path: str, mode: int, owner: tuple[int, int], file: str
    ) -> list[str]:
        self._count += 1
        base = f"{self._settings.run_dir}/files/{self._count}"
        os.makedirs(base, mode=0o700)
        flags = _SAFE | (0 if mode == READ_WRITE else syscalls.MS_RDONLY)
        self._attach(source, kind, base, flags, path)
        try:
            target = _file_at(root, path, owner)
            try:
                place = f"/proc/self/fd/{target}"
                syscalls.mount(f"{base}/{file}", place, flags=syscalls.MS_BIND)
            finally:
                os.close(target)
        except OSError as error:
            syscalls.umount(base, syscalls.MNT_DETACH)
            raise from_os_error(error, path) from error
        except BaseException:
            syscalls.umount(base, syscalls.MNT_DETACH)
            raise
        return [base]

    def _overlay(self, source: str, kind: int, target: str, path: str) -> list[str]:
        boot.load_lazy(self._settings, "overlay")
        self._count += 1
        base = f"{self._settings.run_dir}/overlay/{self._count}"
        lower, top = f"{base}/lower", f"{base}/top"
        for directory in (lower, top):
            os.makedirs(directory, mode=0o700, exist_ok=True)
        self._attach(source, kind, lower, _SAFE | syscalls.MS_RDONLY, path)
        done = [lower]
        try:
            syscalls.mount("tmpfs", top, "tmpfs", _SAFE, "mode=0700")
            done.insert(0, top)
            upper, work = f"{top}/upper", f"{top}/work"
            os.mkdir(upper)
            os.mkdir(work)
            status = os.stat(lower)
            os.chown(upper, status.st_uid, status.st_gid)
            os.chmod(upper, status.st_mode & 0o7777)
            options = f"lowerdir={lower},upperdir={upper},workdir={work}"
            syscalls.mount("overlay", target, "overlay", _SAFE, options)
        except OSError as error:
            for directory in done:
                with contextlib.suppress(OSError):
                    syscalls.umount(directory, syscalls.MNT_DETACH)
            raise _explain(error, source, path) from error
        return done

    def _attach(self, source: str, kind: int, target: str, flags: int, path: str) -> None:
        try:
            if kind == SHARE_9P:
                boot.load_lazy(self._settings, "9p")
                wait_for(
                    lambda: syscalls.mount(source, target, "9p", flags, _OPTIONS_9P),
                    # What the kernel says of a mount tag that no device has.
                    lambda error: isinstance(error, OSError) and error.errno == errno.ENOENT,
                )
            elif kind == SHARE_VIRTIOFS:
                boot.load_lazy(self._settings, "virtiofs")
                syscalls.mount(source, target, "virtiofs", flags)
            elif kind == DISK:
                boot.load_lazy(self._settings, "ext4")
                syscalls.mount(identity.find_disk(source), target, "ext4", flags)
            else:
                raise invalid(f"mount type {kind}", path=path)
        except OSError as error:
            raise _explain(error, source, path) from error


def _file_at(root: Root, path: str, owner: tuple[int, int]) -> int:
    """The file at `path`, opened to be mounted over; it is made if missing and then belongs to `owner`."""
    root.make_parents(path, *owner)
    try:
        target = root.open(path, os.O_PATH)
    except FileNotFoundError:
        made = root.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.fchown(made, *owner)
        finally:
            os.close(made)
        target = root.open(path, os.O_PATH)
    if stat.S_ISDIR(os.fstat(target).st_mode):
        os.close(target)
        raise invalid(f"{path} is a directory, but a file is to be mounted there", path=path)
    return target


def _give_if_empty(root: Root, path: str, owner: tuple[int, int]) -> None:
    """A file system with nothing in it, such as a new volume's, is for the box's user."""
    fd = root.open(path, os.O_RDONLY | os.O_DIRECTORY)  # what is mounted there now
    try:
        if os.listdir(fd) == ["lost+found"]:
            os.fchown(fd, *owner)
    finally:
        os.close(fd)


def _explain(error: OSError, source: str, path: str) -> AgentError:
    if error.errno == errno.ENOENT:
        return not_found(
            f"no device is called {source!r}", reason="DEVICE_NOT_FOUND", source=source, path=path
        )
    if error.errno == errno.ENODEV:
        return AgentError(
            Code.FAILED_PRECONDITION,
            "NO_FILE_SYSTEM",
            f"the guest's kernel cannot mount {source!r}",
            source=source,
        )
    return AgentError(
        Code.INTERNAL,
        "MOUNT_FAILED",
        f"cannot mount {source!r} at {path}: {error.strerror}",
        source=source,
        path=path,
    )
