"""From an overlay's upper directory to a list of changes of the directory below it.

What is compared is the host's directory as it is now, so that what has been brought there already is
no change any more. A change conflicts if the host's own file has been changed since the box began,
by its ctime, which no program sets. Marks of the kernel: Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import contextlib
import enum
import os
import posixpath
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from services.hypervisor import beneath
from services.hypervisor.changes import Layers

_OPAQUE, _ORIGIN = "user.overlay.opaque", "user.overlay.origin"
_HANDLE_AT, _FILEID_INO32_GEN = 21, 1
_CHUNK = 1 << 20
# Of git's own files, those that say what it should run or where to look are not among these.
_GIT_DATA = frozenset(
    (
        b"objects", b"refs", b"logs", b"HEAD", b"ORIG_HEAD", b"FETCH_HEAD", b"MERGE_HEAD", b"MERGE_MSG",
        b"MERGE_MODE", b"CHERRY_PICK_HEAD", b"REVERT_HEAD", b"COMMIT_EDITMSG", b"index", b"packed-refs",
        b"shallow", b"description",
    )
)  # fmt: skip
# Set-user-id and its like are never brought to the host.
MODE_BITS = 0o777


class Kind(enum.Enum):
    """What became of a path."""

    ADDED = "added"
    MODIFIED = "modified"
    DELETED = "deleted"


class FileType(enum.Enum):
    """What is at a path."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "symlink"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One path that a box has changed.

    `type` and `mode` are those after the change, or before it if it is a removal. `before` is the state of
    the host's file. `conflict` says what has happened to that since the box began, `held` why the change
    is brought to the host only if its author is trusted; `impossible` why it never is.
    """

    path: bytes
    kind: Kind
    type: FileType
    mode: int
    size: int = 0
    target: bytes = b""
    before: os.stat_result | None = None
    conflict: str = ""
    held: str = ""
    impossible: str = ""

    @property
    def before_size(self) -> int:
        """Length of the host's file."""
        return self.before.st_size if self.before is not None else 0


def file_type(mode: int) -> FileType:
    """The type that a mode tells of."""
    if stat.S_ISREG(mode):
        return FileType.FILE
    if stat.S_ISDIR(mode):
        return FileType.DIRECTORY
    return FileType.LINK if stat.S_ISLNK(mode) else FileType.OTHER


def wanted(path: bytes, selected: Sequence[bytes]) -> bool:
    """Whether `path` is one of `selected`, or below one; everything is if there are none."""
    return not selected or any(path == one or path.startswith(one + b"/") for one in selected)


def scan(layers: Layers) -> Iterator[Change]:
    """All changes of one overlay: directories before what was made in them, after what was removed.

    Raises:
        OSError: a directory cannot be read.
    """
    scan = _Scan(layers)
    found = list(scan.directory(b""))
    moved = {each.before.st_ino for each in found if each.kind is Kind.DELETED and each.before is not None}
    for change in found:
        # What the box had from the host is either where it was, or has been removed from there by the box.
        origin = scan.origins.get(change.path, 0)
        if not origin or origin in moved:
            yield change
        else:
            yield replace(change, conflict="the host's file has been removed since the box began")


class _Scan:
    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._upper, self._lower = layers.upper, layers.lower
        self.origins: dict[bytes, int] = {}

    def directory(self, start: bytes) -> Iterator[Change]:
        waiting = [(start, False)]
        while waiting:
            path, hidden = waiting.pop()
            below: list[tuple[bytes, bool]] = []
            hidden = hidden or _attribute(self._upper, path, _OPAQUE) == b"y"
            found = beneath.present(self._upper, path, ours=True)
            if hidden:
                names = {name for name, _ in found}
                for name, info in beneath.present(self._lower, path):
                    if name not in names:
                        yield from self._removed(beneath.join(path, name), info)
            for name, info in found:
                each = beneath.join(path, name)
                yield from self._entry(each, info)
                if stat.S_ISDIR(info.st_mode):
                    below.append((each, hidden))
            waiting += reversed(below)

    def _entry(self, path: bytes, info: os.stat_result) -> Iterator[Change]:
        before = beneath.state(self._lower, path)
        if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
            if before is not None:
                yield from self._removed(path, before)
            return
        kind = file_type(info.st_mode)
        if before is not None and file_type(before.st_mode) is not kind:
            yield from self._removed(path, before)
            before = None
        change = Change(
            path=path,
            kind=Kind.ADDED if before is None else Kind.MODIFIED,
            type=kind,
            # Of a directory its owner keeps the rights to it: what the box has put there is to follow.
            mode=info.st_mode & MODE_BITS | (stat.S_IRWXU if kind is FileType.DIRECTORY else 0),
            size=info.st_size if kind is FileType.FILE else 0,
            target=self._target(path) if kind is FileType.LINK else b"",
            before=before,
            conflict=self._conflict(path, before) if before is not None else "",
        )
        if before is not None and self._same(change, before):
            return
        if before is None and kind is FileType.FILE:
            self.origins[path] = _origin_inode(_attribute(self._upper, path, _ORIGIN))
        if kind is FileType.OTHER:
            change = replace(change, impossible="it is neither a file, a directory nor a symbolic link")
        yield replace(change, held=_held(change))

    def _target(self, path: bytes) -> bytes:
        with contextlib.suppress(OSError):
            return beneath.read_link(self._upper, path)
        return b""

    def _removed(self, path: bytes, before: os.stat_result) -> Iterator[Change]:
        """The removal of `path` and all that the host has below it."""
        waiting = [(path, before, False)]
        while waiting:
            path, before, expanded = waiting.pop()
            if stat.S_ISDIR(before.st_mode) and not expanded:
                waiting.append((path, before, True))
                below = beneath.present(self._lower, path)
                waiting += [(beneath.join(path, name), info, False) for name, info in reversed(below)]
                continue
            kind = file_type(before.st_mode)
            change = Change(
                path=path,
                kind=Kind.DELETED,
                type=kind,
                mode=before.st_mode & MODE_BITS,
                before=before,
                # A directory changes with each file that is applied in it; it goes only if it is empty.
                conflict="" if kind is FileType.DIRECTORY else self._conflict(path, before),
            )
            yield replace(change, held=_held(change))

    def _conflict(self, path: bytes, before: os.stat_result) -> str:
        if stat.S_ISDIR(before.st_mode) or before.st_ctime_ns < self._layers.began_ns:
            return ""
        if self._layers.applied.get(path) == (before.st_ctime_ns, before.st_ino):
            return ""
        return "the host's file has been changed since the box began"

    def _same(self, change: Change, before: os.stat_result) -> bool:
        if change.type is FileType.LINK:
            with contextlib.suppress(OSError):
                return beneath.read_link(self._lower, change.path) == change.target
            return False
        if change.mode != before.st_mode & MODE_BITS:
            return False
        if change.type is FileType.FILE:
            return change.size == before.st_size and self._same_content(change.path)
        return change.type is FileType.DIRECTORY

    def _same_content(self, path: bytes) -> bool:
        try:
            ours, theirs = open_file(self._upper, path, ours=True), open_file(self._lower, path)
        except OSError:
            return False
        with ours, theirs:
            while True:
                piece = ours.read(_CHUNK)
                if piece != theirs.read(_CHUNK):
                    return False
                if not piece:
                    return True


def open_file(root: int, path: bytes, *, ours: bool = False) -> BinaryIO:
    """The regular file `path` below `root`, for reading.

    Args:
        ours: Whether a file that its own mode keeps us out of is opened up first.

    Raises:
        OSError: it is none, or may not be read.
    """
    try:
        fd = beneath.open_beneath(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except PermissionError:
        if not ours:
            raise
        place = beneath.open_beneath(root, path, os.O_PATH | os.O_NOFOLLOW)
        try:
            info = os.fstat(place)
            if not stat.S_ISREG(info.st_mode):
                raise
            os.chmod(f"/proc/self/fd/{place}", info.st_mode & 0o7777 | stat.S_IRUSR)
            fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(place)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError("not a regular file any more")
    return os.fdopen(fd, "rb")


def _attribute(root: int, path: bytes, name: str) -> bytes:
    with contextlib.suppress(OSError):
        fd = beneath.open_beneath(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            return os.getxattr(fd, name)
        finally:
            os.close(fd)
    return b""


def _origin_inode(handle: bytes) -> int:
    """The inode number in a mark of where a file was copied from; 0 if there is none that can be read.

    fs/overlayfs/overlayfs.h, struct ovl_fb: version, magic, length, flags, type, UUID, file handle; of
    type FILEID_INO32_GEN it begins with the inode number (linux/exportfs.h).
    """
    if len(handle) < _HANDLE_AT + 4 or handle[:2] != b"\x00\xfb" or handle[4] != _FILEID_INO32_GEN:
        return 0
    return int.from_bytes(handle[_HANDLE_AT : _HANDLE_AT + 4], sys.byteorder)


def _held(change: Change) -> str:
    """Why a change may make programs of the host do something; empty if it may not."""
    parts = change.path.split(b"/")
    for at, part in enumerate(parts):
        inner = parts[at + 1 : at + 2]
        data = inner[0] in _GIT_DATA if inner else change.type is FileType.DIRECTORY
        if part.lower() == b".git" and not data:
            return "git may run what it names"
    if change.type is FileType.LINK and change.kind is not Kind.DELETED:
        where = posixpath.normpath(b"/".join((*parts[:-1], change.target)))
        if change.target.startswith(b"/") or where == b".." or where.startswith(b"../"):
            return "the link leads out of the directory"
    return ""
