"""An overlay's upper directory, made by hand, is compared with the directory below it and applied to it.

The upper directory holds what a hostile box may leave there: links and names that lead out, devices'
marks, set-user-id files, directories that nobody may read. The host's own edits come in between.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
import time
from pathlib import Path

import pytest

from services.common.errors import AlreadyExists, InvalidInput, NotFound
from services.hypervisor import apply, beneath, changeset
from services.hypervisor.changes import ChangeSet, ChangeStore, Layers, Overlay
from services.hypervisor.inputs import Identity
from services.hypervisor.model import BoxConfig, Mount, MountMode
from services.hypervisor.reviews import Reviews, Selection

CONFIG = BoxConfig(
    kernel_path="/k",
    initramfs_path="/i",
    mounts=(Mount(host_path="/x", guest_path="/w", mode=MountMode.OVERLAY),),
)


class Rig:
    """A host's directory, a box's changes of it, and both open."""

    def __init__(self, base: Path) -> None:
        self.lower, self.upper, self.outside = base / "lower", base / "upper", base / "outside"
        for path in (self.lower, self.upper, self.outside):
            path.mkdir()
        self.applied: dict[bytes, tuple[int, int]] = {}
        self.began = 0

    def begin(self) -> None:
        """All that the host changes from now on is a conflict."""
        probe = self.lower.parent / "probe"
        # File times move with the kernel's tick; the next one is the box's beginning.
        while True:
            probe.write_text("x")
            now = probe.stat().st_ctime_ns
            if now > max((path.lstat().st_ctime_ns for path in self.lower.rglob("*")), default=0):
                self.began = now
                return

    def whiteout(self, name: str) -> None:
        os.mknod(self.upper / name, stat.S_IFCHR | 0o600, 0)

    def layers(self) -> Layers:
        return Layers(
            overlay=Overlay(number=0, host_path=str(self.lower), guest_path="/w"),
            lower=os.open(self.lower, os.O_RDONLY),
            upper=os.open(self.upper, os.O_RDONLY),
            began_ns=self.began,
            applied=self.applied,
        )

    def scan(self) -> list[changeset.Change]:
        layers = self.layers()
        try:
            return list(changeset.scan(layers))
        finally:
            os.close(layers.lower)
            os.close(layers.upper)

    def short(self) -> list[tuple[str, str, str]]:
        return [(each.kind.value, each.type.value, os.fsdecode(each.path)) for each in self.scan()]

    def apply(self, changes: list[changeset.Change] | None = None) -> list[changeset.Change]:
        layers = self.layers()
        try:
            return apply.apply(list(changeset.scan(layers)) if changes is None else changes, layers)
        finally:
            os.close(layers.lower)
            os.close(layers.upper)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def tree(path: Path) -> dict[str, str]:
    return {
        str(each.relative_to(path)): os.readlink(each)
        if each.is_symlink()
        else "/"
        if each.is_dir()
        else each.read_text()
        for each in sorted(path.rglob("*"))
    }


def test_changes_are_found_in_an_order_in_which_they_can_be_applied(rig: Rig) -> None:
    for name in (
        "kept",
        "changed",
        "removed",
        "d/one",
        "d/two/three",
        "becomes-directory",
        "e/old",
        "e/both",
    ):
        (rig.lower / name).parent.mkdir(parents=True, exist_ok=True)
        (rig.lower / name).write_text(name)
    (rig.lower / "becomes-file").mkdir()
    (rig.lower / "becomes-file/x").write_text("x")
    (rig.lower / "link").symlink_to("kept")
    rig.begin()
    (rig.upper / "kept").write_text("kept")  # copied up, as when it was only touched
    (rig.upper / "changed").write_text("CHANGED")
    rig.whiteout("removed")
    rig.whiteout("d")
    rig.whiteout("was-never-there")
    (rig.upper / "becomes-directory").mkdir()
    (rig.upper / "becomes-directory/in").write_text("in")
    (rig.upper / "becomes-file").write_text("file")
    (rig.upper / "link").symlink_to("changed")
    (rig.upper / "new/deep").mkdir(parents=True)
    (rig.upper / "new/deep/file").write_text("new")
    (rig.upper / "e").mkdir()
    os.setxattr(rig.upper / "e", "user.overlay.opaque", b"y")
    (rig.upper / "e/both").write_text("BOTH")
    assert rig.short() == [
        ("deleted", "file", "becomes-directory"),
        ("added", "directory", "becomes-directory"),
        ("deleted", "file", "becomes-file/x"),
        ("deleted", "directory", "becomes-file"),
        ("added", "file", "becomes-file"),
        ("modified", "file", "changed"),
        ("deleted", "file", "d/one"),
        ("deleted", "file", "d/two/three"),
        ("deleted", "directory", "d/two"),
        ("deleted", "directory", "d"),
        ("modified", "symlink", "link"),
        ("added", "directory", "new"),
        ("deleted", "file", "removed"),
        ("added", "file", "becomes-directory/in"),
        ("deleted", "file", "e/old"),
        ("modified", "file", "e/both"),
        ("added", "directory", "new/deep"),
        ("added", "file", "new/deep/file"),
    ]
    assert not [each for each in rig.scan() if each.conflict or each.held or each.impossible]
    assert not [each for each in rig.apply() if each.impossible]
    assert tree(rig.lower) == {
        "becomes-directory": "/",
        "becomes-directory/in": "in",
        "becomes-file": "file",
        "changed": "CHANGED",
        "e": "/",
        "e/both": "BOTH",
        "kept": "kept",
        "link": "changed",
        "new": "/",
        "new/deep": "/",
        "new/deep/file": "new",
    }
    assert rig.scan() == [], "what was applied is no change any more"


def test_what_the_host_changed_since_the_box_began_conflicts_until_it_is_the_same(rig: Rig) -> None:
    for name in ("mine", "both", "gone", "moved", "quiet"):
        (rig.lower / name).write_text("old")
    rig.begin()
    for name in ("both", "quiet", "added-by-both"):
        (rig.upper / name).write_text("box")
    (rig.lower / "both").write_text("host")
    (rig.lower / "added-by-both").write_text("host")
    (rig.upper / "gone").write_text("box")
    inode = (rig.lower / "gone").stat().st_ino
    handle = b"\0\xfb\x1d\0\x01" + bytes(16) + inode.to_bytes(4, sys.byteorder) + bytes(4)
    os.setxattr(rig.upper / "gone", "user.overlay.origin", handle)
    (rig.upper / "renamed").write_text("old")
    inode = (rig.lower / "moved").stat().st_ino
    handle = b"\0\xfb\x1d\0\x01" + bytes(16) + inode.to_bytes(4, sys.byteorder) + bytes(4)
    os.setxattr(rig.upper / "renamed", "user.overlay.origin", handle)
    rig.whiteout("moved")
    (rig.lower / "gone").unlink()
    rig.whiteout("mine")
    os.utime(rig.lower / "mine", ns=(0, 0))  # a faked time changes nothing: the ctime tells
    found = {os.fsdecode(each.path): each.conflict for each in rig.scan()}
    changed = "the host's file has been changed since the box began"
    assert found == {
        "added-by-both": changed,
        "both": changed,
        "gone": "the host's file has been removed since the box began",
        "mine": changed,
        "moved": "",
        "quiet": "",
        "renamed": "",
    }
    (rig.lower / "both").write_text("box")
    assert "both" not in [os.fsdecode(each.path) for each in rig.scan()]
    # Applying changes the host's files, which is no conflict with what the box changes afterwards.
    rig.apply([each for each in rig.scan() if each.path == b"quiet"])
    (rig.upper / "quiet").write_text("box again")
    assert [each.conflict for each in rig.scan() if each.path == b"quiet"] == [""]
    (rig.lower / "quiet").write_text("host")
    assert [each.conflict for each in rig.scan() if each.path == b"quiet"] == [changed]


def test_nothing_that_a_box_leaves_leads_out_of_the_directory(rig: Rig) -> None:
    (rig.outside / "secret").write_text("secret")
    (rig.lower / "out").symlink_to(rig.outside)
    (rig.lower / "plain").write_text("old")
    rig.begin()
    # The box has replaced the host's link by a directory of its own, whose content must not go through it.
    (rig.upper / "out").mkdir()
    (rig.upper / "out/secret").write_text("stolen")
    (rig.upper / "absolute").symlink_to("/etc/passwd")
    (rig.upper / "d").mkdir()
    (rig.upper / "d/up").symlink_to("../../outside/secret")
    (rig.upper / "d/fine").symlink_to("../plain")
    (rig.upper / "suid").write_text("#!/bin/sh")
    (rig.upper / "suid").chmod(0o6755)
    os.mkfifo(rig.upper / "fifo")
    (rig.upper / "closed").mkdir()
    (rig.upper / "closed/file").write_text("x")
    (rig.upper / "closed/file").chmod(0)
    (rig.upper / "closed").chmod(0)
    (rig.upper / ".git/hooks").mkdir(parents=True)
    (rig.upper / ".git/hooks/post-checkout").write_text("evil")
    (rig.upper / ".git/objects").mkdir()
    (rig.upper / "sub/.GIT").mkdir(parents=True)
    (rig.upper / "sub/.GIT/config").write_text("evil")
    found = {os.fsdecode(each.path): each for each in rig.scan()}
    assert {name for name, each in found.items() if each.held} == {
        "absolute", "d/up", ".git/hooks", ".git/hooks/post-checkout", "sub/.GIT/config",
    }  # fmt: skip
    assert {name for name, each in found.items() if each.impossible} == {"fifo"}
    kept = [each for each in rig.scan() if not each.held and not each.impossible]
    assert not [each for each in rig.apply(kept) if each.impossible]
    assert (rig.outside / "secret").read_text() == "secret"
    assert (rig.lower / "out/secret").read_text() == "stolen"
    assert not (rig.lower / "out").is_symlink()
    assert stat.S_IMODE((rig.lower / "suid").stat().st_mode) == 0o755
    assert stat.S_IMODE((rig.lower / "closed").stat().st_mode) == 0o700
    assert [os.fsdecode(each.path) for each in rig.scan() if not each.held and not each.impossible] == []


def test_a_link_that_the_host_puts_in_the_way_is_not_followed(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    (rig.lower / "d/file").write_text("old")
    (rig.outside / "file").write_text("outside")
    rig.begin()
    (rig.upper / "d").mkdir()
    (rig.upper / "d/file").write_text("box")
    changes = rig.scan()
    (rig.lower / "d").rename(rig.lower / "moved")
    (rig.lower / "d").symlink_to(rig.outside)
    [done] = rig.apply([each for each in changes if each.path == b"d/file"])
    assert done.impossible
    assert (rig.outside / "file").read_text() == "outside"
    assert tree(rig.outside) == {"file": "outside"}


@pytest.mark.parametrize("how", ["modified", "deleted", "added"])
def test_an_edit_between_comparing_and_applying_is_not_lost(rig: Rig, how: str) -> None:
    if how != "added":
        (rig.lower / "file").write_text("old")
    rig.begin()
    if how == "deleted":
        rig.whiteout("file")
    else:
        (rig.upper / "file").write_text("box")
    changes = rig.scan()
    (rig.lower / "edited").write_text("the user's")
    (rig.lower / "edited").rename(rig.lower / "file")  # as editors save
    [done] = rig.apply(changes)
    assert done.impossible
    assert tree(rig.lower) == {"file": "the user's"}, "nothing else is left there either"


def test_edits_while_applying_are_either_there_or_told_of(rig: Rig) -> None:
    """A user saves one file again and again while it is applied again and again."""
    (rig.lower / "file").write_text("0")
    rig.begin()
    saved = ["0"]
    stop = threading.Event()

    def user() -> None:
        while not stop.is_set():
            text = str(len(saved))
            (rig.lower / "edit").write_text(text)
            saved.append(text)
            (rig.lower / "edit").rename(rig.lower / "file")

    other = threading.Thread(target=user)
    other.start()
    try:
        deadline = time.monotonic() + 1
        number = 0
        while time.monotonic() < deadline and number < 200:
            number += 1
            (rig.upper / "file").write_text(f"box {number}")
            rig.apply()
            assert not [name for name in os.listdir(rig.lower) if name not in ("file", "edit")]
    finally:
        stop.set()
        other.join()
    last = (rig.lower / "file").read_text()
    assert last == saved[-1] or last.startswith("box ")


def test_paths_select_what_is_at_and_below_them() -> None:
    for path, selected, expected in (
        (b"a/b", [], True),
        (b"a/b", [b"a"], True),
        (b"a", [b"a"], True),
        (b"ab", [b"a"], False),
        (b"a", [b"a/b"], False),
    ):
        assert changeset.wanted(path, selected) is expected
    for bad in (b"", b"/a", b"a/../b", b"./a", b"a//b", b"a\0", b"a" * 5000):
        with pytest.raises(InvalidInput):
            Selection(box_id="b", paths=(bad,))


def test_a_tree_too_deep_to_be_named_cannot_be_measured(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    opened = [fd]
    for _ in range(30):
        os.mkdir(b"x" * 200, dir_fd=opened[-1])
        opened.append(os.open(b"x" * 200, os.O_RDONLY, dir_fd=opened[-1]))
    try:
        with pytest.raises(OSError, match="too long"):
            beneath.used_bytes(fd)
    finally:
        for each in opened:
            os.close(each)


async def test_changes_outlive_a_box_and_the_oldest_make_room(tmp_path: Path) -> None:
    host = tmp_path / "host"
    host.mkdir()
    mounts = (Mount(host_path=str(host), guest_path="/w", mode=MountMode.OVERLAY),)
    config = BoxConfig(kernel_path="/k", initramfs_path="/i", mounts=mounts, labels={"run": "r"})
    root = tmp_path / "changes"
    root.mkdir()
    store = ChangeStore(root, 1 << 20, 10 << 12)
    for box, count in (("old", 4), ("none", 0), ("new", 5), ("last", 3)):
        fd = os.open(host, os.O_RDONLY)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, fd)
            store.check_free(box, config)
            store.open_layers(box, config, [fd], Identity(os.geteuid(), os.getegid()), stack)
        (root / box / "0/work/work").mkdir(mode=0)  # as the kernel leaves it
        for number in range(count):
            (root / box / f"0/upper/{number}").write_text("x")
        (root / box / "0/upper").chmod(0o755)
        assert store.get(box).ended is False
        await store.end(box)
    assert [each.id for each in store.all({"run": "r"})] == ["new", "last"]
    assert [each.id for each in store.all({"run": "other"})] == []
    with pytest.raises(AlreadyExists):
        store.check_free("last", config)
    with pytest.raises(NotFound):
        store.get("old")
    # A service that died leaves a box without an end, and half of a removal.
    (root / ".trash-x/deep").mkdir(parents=True)
    (root / "half").mkdir()
    await store.clean([])
    assert sorted(os.listdir(root)) == ["last", "new"]
    await store.remove("new")
    await store.remove("new")
    assert os.listdir(root) == ["last"]


async def test_a_conflict_stops_everything_and_force_does_not(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    (rig.lower / "a").write_text("old")
    (rig.lower / "b").write_text("old")
    root = tmp_path / "changes"
    (root / "box/0").mkdir(parents=True)
    rig.upper.rename(root / "box/0/upper")
    rig.begin()
    overlay = Overlay(number=0, host_path=str(rig.lower), guest_path="/w")
    store = ChangeStore(root, 1 << 20, 1 << 20)
    store._write(ChangeSet(id="box", began_ns=rig.began, labels={}, overlays=(overlay,), ended=True))
    (root / "box/0/upper/a").write_text("box")
    (root / "box/0/upper/b").write_text("box")
    (rig.lower / "b").write_text("host")
    reviews = Reviews(store)

    async def go(**options: bool) -> list[tuple[str, bool]]:
        flags = {"dry_run": False, "force": False, "trust": False} | options
        [(_, done)] = await reviews.apply(Selection(box_id="box"), **flags)
        return [(os.fsdecode(each.change.path), each.applied) for each in done]

    assert await go() == [("a", False), ("b", False)]
    assert tree(rig.lower) == {"a": "old", "b": "host"}
    assert await go(dry_run=True, force=True) == [("a", True), ("b", True)]
    assert tree(rig.lower) == {"a": "old", "b": "host"}
    with pytest.raises(NotFound):
        await reviews.apply(Selection(box_id="box", guest_path="/x"), dry_run=True, force=False, trust=False)
    assert await go(force=True) == [("a", True), ("b", True)]
    assert tree(rig.lower) == {"a": "box", "b": "box"}
    assert store.all() == [], "nothing is left to apply of a box that is gone"
