"""Opening files in the root that programs run in, whatever links the programs have left there.

Rule: the agent acts as root, new files belong to the box's default user (or the owner the
caller names). The kernel resolves every path inside the root (`openat2`,
RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS), so neither `..` nor a symbolic link leaves it.
The agent's own files are refused by where a path really leads, not by how it is spelt.
"""

from __future__ import annotations

import os
import stat

from guest import syscalls
from guest.errors import denied, invalid, wrong_state

_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_PATH_LIMIT = 4096
_PRIVATE = ("/usr/lib/voidbox", "/init")


class Root:
    """A directory tree that is opened by absolute paths.

    Args:
        path: The root as the agent sees it.
        private: Directories, as the agent sees them, that callers must not reach.
    """

    def __init__(self, path: str, private: tuple[str, ...]) -> None:
        self.path = path
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        prefix = "" if path == "/" else path
        self._private = private + (_PRIVATE if path == "/" else ())
        self._prefix = prefix
        try:
            self._proc = os.stat("/proc").st_dev
        except OSError:
            self._proc = -1

    def close(self) -> None:
        """Let go of the root."""
        os.close(self.fd)

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        """Open what `path` leads to: a file descriptor.

        It is looked at before it is really opened: opening a device or a FIFO can have effects.

        Raises:
            OSError: as open(2).
            AgentError: the path is malformed or leads to something private.
        """
        check(path)
        first = flags if flags & os.O_CREAT else os.O_PATH | flags & (os.O_DIRECTORY | os.O_NOFOLLOW)
        fd = syscalls.openat2(path, dir_fd=self.fd, flags=first, resolve=_RESOLVE, mode=mode)
        try:
            self.refuse_private(fd, path)
            if first == flags:
                found, fd = fd, -1
                return found
            return reopen(fd, flags)
        finally:
            if fd >= 0:
                os.close(fd)

    def open_parent(self, path: str) -> tuple[int, str]:
        """The directory that `path` lies in, opened, and its last name, which is not followed.

        Raises:
            OSError: as open(2).
            AgentError: the path is malformed, is the root itself or leads to something private.
        """
        directory, name = split(path)
        fd = self.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            self.refuse_private(fd, path, name)
        except BaseException:
            os.close(fd)
            raise
        return fd, name

    def make_parents(self, path: str, uid: int, gid: int) -> None:
        """Make the missing directories that `path` lies in, owned by uid and gid.

        Raises:
            OSError: as mkdir(2).
        """
        self.make_directories(split(path)[0], uid, gid, 0o755)

    def make_directories(self, path: str, uid: int, gid: int, mode: int) -> None:
        """Make `path` and what is missing above it; existing directories stay as they are."""
        check(path)
        done = ""
        for part in path.split("/"):
            if part in ("", "."):
                continue
            if part == "..":
                raise invalid(f"{path}: .. in a path that shall be made", path=path)
            try:
                parent = self.open(done or "/", os.O_PATH | os.O_DIRECTORY)
            except NotADirectoryError:
                raise wrong_state(f"{done} is not a directory", reason="NOT_A_DIRECTORY", path=done) from None
            try:
                self.refuse_private(parent, path, part)
                made = make_directory(parent, part, uid, gid, mode)
                if not made:
                    self._check_directory(f"{done}/{part}")
            finally:
                os.close(parent)
            done = f"{done}/{part}"

    def _check_directory(self, path: str) -> None:
        try:
            os.close(self.open(path, os.O_PATH | os.O_DIRECTORY))
        except NotADirectoryError:
            raise wrong_state(f"{path} is not a directory", reason="NOT_A_DIRECTORY", path=path) from None

    def read_text(self, path: str, limit: int = 1 << 20) -> str:
        """The content of a small regular file; empty if there is none."""
        try:
            fd = self.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            return ""
        try:
            # Not one read for all: a file of /proc or 9p may give less at a time.
            parts = []
            while limit > 0 and stat.S_ISREG(os.fstat(fd).st_mode) and (part := os.read(fd, limit)):
                parts.append(part)
                limit -= len(part)
            return b"".join(parts).decode(errors="replace")
        finally:
            os.close(fd)

    def refuse_private(self, fd: int, path: str, name: str = "") -> None:
        """Refuse what belongs to the agent.

        Raises:
            AgentError: PERMISSION_DENIED.
        """
        real = os.readlink(f"/proc/self/fd/{fd}")
        if name:
            real = f"{real.rstrip('/')}/{name}"
        for private in self._private:
            if real == private or real.startswith(private + "/"):
                raise denied(f"{path} belongs to the guest agent", reason="AGENT_PRIVATE", path=path)
        if real.startswith("/proc/") and not name:
            found = os.fstat(fd)
            # environ, mem and their like, of the agent too: what not everybody may read, nobody reads here.
            if (
                found.st_dev == self._proc
                and stat.S_ISREG(found.st_mode)
                and not found.st_mode & stat.S_IROTH
            ):
                raise denied(f"{path} is private to its process", reason="PROCESS_PRIVATE", path=path)


def reopen(fd: int, flags: int) -> int:
    """Open for use what `fd` (O_PATH) refers to."""
    return os.open(f"/proc/self/fd/{fd}", flags & ~(os.O_NOFOLLOW | os.O_EXCL) | os.O_CLOEXEC)


def check(path: str) -> None:
    """Refuse what is no absolute path.

    Raises:
        AgentError: INVALID_ARGUMENT.
    """
    if not path.startswith("/"):
        raise invalid(f"{path!r} is not an absolute path", reason="BAD_PATH", path=path)
    if "\0" in path or len(path.encode()) >= _PATH_LIMIT:
        raise invalid(f"{path[:80]!r} is not a path: it holds NUL or is too long", reason="BAD_PATH")


def split(path: str) -> tuple[str, str]:
    """The directory and the last name of an absolute path.

    Raises:
        AgentError: INVALID_ARGUMENT if there is no last name, or it is `.` or `..`.
    """
    check(path)
    directory, _, name = path.rstrip("/").rpartition("/")
    if name in ("", ".", ".."):
        raise invalid(f"{path!r} does not name a file in a directory", reason="BAD_PATH", path=path)
    return directory or "/", name


def make_directory(parent: int, name: str, uid: int, gid: int, mode: int) -> bool:
    """Make one directory below an open one; False if something of that name exists."""
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return False
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if os.geteuid() == 0:
            os.fchown(fd, uid, gid)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)
    return True
