"""The merged file tree of an image, in memory: what each layer adds, replaces and hides.

Rules (OCI image-spec, layer.md), and what is done where it is silent:

- A whiteout and an opaque marker hide what *lower* layers brought, wherever they stand in their
  own layer; what the same layer adds is never hidden by it.
- A directory over a directory keeps the contents and takes the new metadata; anything else that
  comes twice replaces what was there.
- Parents are resolved inside the tree, symbolic links included, as `chroot` would; a missing
  parent becomes a directory 0755 of root with mtime 0.
- A leading `/` or `./` is dropped; a `..` component, a parent that is no directory, and a hard
  link to a directory or to nothing are refused.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from services.common.errors import InvalidInput

MAX_SYMLINKS: Final = 40  # the kernel's MAXSYMLINKS
MAX_FOLLOWED: Final = 20_000_000  # components of link targets walked for one image: some seconds
MAX_COMPONENT: Final = 255  # EXT4_NAME_LEN
_NOT_NAMES: Final = (b"", b".", b"..")
_REMEMBERED: Final = 4096  # directories whose paths are kept
_WHITEOUT: Final = b".wh."
_META: Final = b".wh..wh."
_OPAQUE: Final = b".wh..wh..opq"


class Kind(enum.IntEnum):
    """File types, with the numbers that ext4 directory entries use."""

    FILE = 1
    DIRECTORY = 2
    CHARDEV = 3
    BLOCKDEV = 4
    FIFO = 5
    SYMLINK = 7


class Extent(NamedTuple):
    """`length` blocks of a file from its block `logical` on, stored from block `physical` on."""

    logical: int
    physical: int
    length: int


_NO_CHILDREN: Final[dict[bytes, Any]] = {}  # one for all files: an empty dict each costs 64 bytes


class Node:
    """One inode. Hard links are several names for one node.

    Attributes:
        mode: The twelve permission bits.
        size: Bytes of a file, holes included.
        extents: Where a file's data lies in the image.
        target: Of a symbolic link.
        children: Of a directory: name to node.
        number: The inode number, 0 until the image is laid out.
    """

    __slots__ = (
        "children", "extents", "gid", "kind", "links", "major", "minor", "mode", "mtime_ns", "number",
        "size", "target", "uid", "xattrs",
    )  # fmt: skip

    def __init__(self, kind: Kind, mode: int, uid: int = 0, gid: int = 0, mtime_ns: int = 0) -> None:
        self.kind = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns
        self.size = 0
        self.major = 0
        self.minor = 0
        self.target = b""
        self.extents: tuple[Extent, ...] = ()
        self.xattrs: dict[bytes, bytes] | None = None
        self.children: dict[bytes, Node] = {} if kind is Kind.DIRECTORY else _NO_CHILDREN
        self.links = 0
        self.number = 0

    def take_metadata(self, other: Node) -> None:
        """Become `other` in everything but contents; both are directories."""
        self.mode, self.uid, self.gid = other.mode, other.uid, other.gid
        self.mtime_ns, self.xattrs = other.mtime_ns, other.xattrs


def implied_directory() -> Node:
    """What a directory that no layer describes looks like."""
    return Node(Kind.DIRECTORY, 0o755)


class Tree:
    """The tree so far. `begin_layer` starts the next one above it."""

    def __init__(self) -> None:
        self.root = implied_directory()
        self._added: set[tuple[int, bytes]] = set()  # (id of directory, name) that this layer brought
        self._cleared: set[int] = set()  # ids of directories that hold nothing of lower layers any more
        # Where what is before the last slash of a path leads, until anything on the way may have changed.
        self._found: dict[bytes, Node] = {}
        self._followed = 0
        self._kept: list[Node] = []  # keeps replaced directories alive, so that no id is used twice

    def begin_layer(self) -> None:
        """What comes from now on belongs to the next layer."""
        self._added.clear()
        self._found.clear()
        self._cleared.clear()
        self._kept.clear()

    def apply_marker(self, path: bytes) -> bool:
        """Whether `path` was a whiteout, an opaque marker or AUFS metadata, and so is dealt with.

        Raises:
            InvalidInput: it is a marker that means nothing, or it breaks a path rule.
        """
        if _WHITEOUT not in path:
            return False
        self._found.clear()
        parts = split_path(path)
        if not parts or not any(part.startswith(_WHITEOUT) for part in parts):
            return False
        *parents, last = parts
        if any(part.startswith(_META) for part in parts) and last != _OPAQUE:
            return True  # AUFS bookkeeping; engines ignore it
        if any(part.startswith(_WHITEOUT) for part in parents):
            raise InvalidInput("a path component above the last begins with .wh.", reason="BAD_WHITEOUT")
        directory = self._directory(parents, create=False)
        if last == _OPAQUE:
            if directory is not None:
                self._hide_lower(directory)
            return True
        name = last[len(_WHITEOUT) :]
        if name in (b"", b".", b".."):
            raise InvalidInput(f"the whiteout {last!r} names no file", reason="BAD_WHITEOUT")
        if directory is not None and name in directory.children:
            self._hide_lower_name(directory, name)
        return True

    def add(self, path: bytes, node: Node) -> None:
        """Put `node` at `path`, replacing what is there by the rules above.

        Raises:
            InvalidInput: the path breaks a rule.
        """
        above, slash, name = path.rpartition(b"/")
        if slash and not name:
            above, _, name = above.rpartition(b"/")
        plain = name not in _NOT_NAMES and len(name) <= MAX_COMPONENT and b"\0" not in name
        directory = self._found.get(above) if plain else None
        if directory is None:
            parts = split_path(path)
            if not parts:
                if node.kind is not Kind.DIRECTORY:
                    raise InvalidInput("the root of an image must be a directory")
                self.root.take_metadata(node)
                return
            *parents, name = parts
            directory = self._directory(parents, create=True)
            assert directory is not None
            if plain:
                if len(self._found) >= _REMEMBERED:
                    self._found.clear()
                self._found[above] = directory
        self._put(directory, name, node)

    def link(self, path: bytes, target: bytes) -> bool:
        """Make `path` another name of what is at `target`; False if nothing is there.

        Raises:
            InvalidInput: a path breaks a rule or the target is a directory.
        """
        parts = split_path(target)
        if not parts:
            raise InvalidInput("a hard link to the root", reason="BAD_HARDLINK")
        directory = self._directory(parts[:-1], create=False)
        node = directory.children.get(parts[-1]) if directory else None
        if node is None:
            return False
        if node.kind is Kind.DIRECTORY:
            raise InvalidInput(f"a hard link to the directory {target[:60]!r}", reason="BAD_HARDLINK")
        self.add(path, node)
        return True

    def _put(self, directory: Node, name: bytes, node: Node) -> None:
        present = directory.children.get(name)
        if present is not None and present is not node and present.kind is Kind.DIRECTORY:
            if node.kind is Kind.DIRECTORY:
                present.take_metadata(node)
                self._added.add((id(directory), name))
                return
            self._kept.append(present)
            self._found.clear()
        elif present is not None and present.kind is Kind.SYMLINK:
            self._found.clear()
        directory.children[name] = node
        self._added.add((id(directory), name))

    def _directory(self, parts: list[bytes], *, create: bool) -> Node | None:
        """The directory at `parts`, symbolic links followed inside the tree."""
        trail = [self.root]
        waiting = parts[::-1]
        followed = 0
        while waiting:
            part = waiting.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":  # only out of a symbolic link
                if len(trail) > 1:
                    trail.pop()
                continue
            here = trail[-1]
            child = here.children.get(part)
            if child is None:
                if not create:
                    return None
                check_component(part)
                child = implied_directory()
                here.children[part] = child
                self._added.add((id(here), part))
            if child.kind is Kind.DIRECTORY:
                trail.append(child)
            elif child.kind is Kind.SYMLINK:
                followed += 1
                if followed > MAX_SYMLINKS:
                    raise InvalidInput(
                        f"more than {MAX_SYMLINKS} symbolic links on the way", reason="SYMLINK_LOOP"
                    )
                if child.target.startswith(b"/"):
                    del trail[1:]
                target = child.target.split(b"/")
                self._followed += len(target)
                if self._followed > MAX_FOLLOWED:
                    raise InvalidInput(
                        "the image's paths lead through too many symbolic links", reason="SYMLINK_LOOP"
                    )
                waiting.extend(target[::-1])
            else:
                if not create:
                    return None
                raise InvalidInput(
                    f"its parent {part[:60]!r} is not a directory", reason="PARENT_NOT_DIRECTORY"
                )
        return trail[-1]

    def _hide_lower_name(self, directory: Node, name: bytes) -> None:
        node = directory.children[name]
        if node.kind is not Kind.DIRECTORY:
            if (id(directory), name) not in self._added:
                del directory.children[name]
            return
        self._hide_lower(node)
        if (id(directory), name) in self._added:
            return
        if node.children:  # this layer put something in: the directory stays, as if implied by that
            node.take_metadata(implied_directory())
            self._added.add((id(directory), name))
        else:
            self._kept.append(node)
            del directory.children[name]

    def _hide_lower(self, top: Node) -> None:
        """Drop from `top` downwards everything that this layer did not add. Iterative: trees may be deep."""
        stack: list[tuple[Node, Node | None, bytes]] = [(top, None, b"")]
        order: list[tuple[Node, Node | None, bytes]] = []
        while stack:
            item = stack.pop()
            node = item[0]
            order.append(item)
            if id(node) in self._cleared:
                continue
            self._cleared.add(id(node))
            for name, child in list(node.children.items()):
                if child.kind is Kind.DIRECTORY:
                    stack.append((child, node, name))
                elif (id(node), name) not in self._added:
                    del node.children[name]
        for node, parent, name in reversed(order):
            if parent is None or (id(parent), name) in self._added:
                continue
            if node.children:
                node.take_metadata(implied_directory())
                self._added.add((id(parent), name))
            else:
                self._kept.append(node)
                del parent.children[name]

    def walk(self) -> Iterator[tuple[Node, bytes, Node]]:
        """Every (directory, name, node) below the root, names sorted, directories before their contents."""
        stack = [self.root]
        while stack:
            directory = stack.pop()
            below = []
            for name in sorted(directory.children):
                node = directory.children[name]
                yield directory, name, node
                if node.kind is Kind.DIRECTORY:
                    below.append(node)
            stack.extend(reversed(below))


def check_component(part: bytes) -> None:
    """Refuse a name that no Linux file can have."""
    if len(part) > MAX_COMPONENT:
        raise InvalidInput(
            f"a name of {len(part)} bytes; Linux allows {MAX_COMPONENT}", reason="NAME_TOO_LONG"
        )
    if b"\0" in part:
        raise InvalidInput("a name contains a NUL byte", reason="BAD_NAME")


def split_path(path: bytes) -> list[bytes]:
    """The components of an archive path; empty for the root.

    Raises:
        InvalidInput: one is `..`, too long, or contains NUL; or the path is empty.
    """
    if not path:
        raise InvalidInput("an empty name", reason="BAD_NAME")
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise InvalidInput("a path component is '..'", reason="PATH_ESCAPE")
    for part in parts:
        check_component(part)
    return parts
