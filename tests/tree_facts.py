"""What can be seen of a tree of files, as root; also a program that needs nothing but Python.

    python3 tree_facts.py DIRECTORY

prints what `facts_below` returns as a list of (name, fields…), groups sorted: for places that have no other
module of this project, such as a box.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Facts:
    """What can be seen of one file. Names of the same inode share `group`."""

    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    digest: str = ""
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    links: int = 1
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    group: frozenset[bytes] = frozenset()


_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "chardev",
    stat.S_IFBLK: "blockdev",
    stat.S_IFIFO: "fifo",
}


def facts_below(root: Path) -> dict[bytes, Facts]:
    """Facts of everything below `root`, which itself is b"."; `lost+found` is left out."""
    found: dict[bytes, Facts] = {}
    inodes: dict[tuple[int, int], set[bytes]] = {}
    base = os.fsencode(root)
    names = [b"."]
    for here, directories, files in os.walk(base):
        names += [os.path.relpath(os.path.join(here, name), base) for name in directories + files]
    for name in names:
        info = os.lstat(os.path.join(base, name))
        if not stat.S_ISDIR(info.st_mode):
            inodes.setdefault((info.st_dev, info.st_ino), set()).add(name)
    for name in names:
        if name.split(b"/")[0] == b"lost+found":
            continue
        path = os.path.join(base, name)
        info = os.lstat(path)
        kind = _KINDS[stat.S_IFMT(info.st_mode)]
        listed = os.listxattr(path, follow_symlinks=False)
        xattrs = {
            os.fsencode(key): os.getxattr(path, key, follow_symlinks=False)
            for key in listed
            if key != "security.selinux"
        }
        found[name] = Facts(
            kind=kind,
            mode=stat.S_IMODE(info.st_mode),
            uid=info.st_uid,
            gid=info.st_gid,
            mtime_ns=info.st_mtime_ns,
            size=info.st_size if kind == "file" else 0,
            digest=_file_digest(path) if kind == "file" else "",
            target=os.readlink(path) if kind == "symlink" else b"",
            device=(os.major(info.st_rdev), os.minor(info.st_rdev)) if kind.endswith("dev") else (0, 0),
            links=0 if kind == "directory" else info.st_nlink,
            xattrs=tuple(sorted(xattrs.items())),
            group=frozenset(inodes.get((info.st_dev, info.st_ino), {name})),
        )
    return found


def _file_digest(path: bytes) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    print(
        [
            (name, *dataclasses.astuple(facts)[:-1], sorted(facts.group))
            for name, facts in facts_below(Path(sys.argv[1])).items()
        ]
    )
