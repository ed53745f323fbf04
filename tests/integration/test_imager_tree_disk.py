"""Directories of this machine become read-only disks: what is in them is kept, who and when is not."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from services.common.errors import Cancelled, Exhausted, InvalidInput, NotFound
from services.imager.cache import ImageCache
from services.imager.disk import Disk
from services.imager.limits import Cancel, Limits
from services.imager.tree_disk import EPOCH_NS, build_tree_disk
from tests.imager_images import check_ext4, mounted, run
from tests.tree_facts import facts_below


def make_skill(root: Path) -> Path:
    """A directory as a skill may have it."""
    (root / "bin").mkdir(parents=True)
    (root / "bin/tool").write_bytes(os.urandom(3_000_000))
    (root / "bin/tool").chmod(0o4755)
    (root / "bin/same").hardlink_to(root / "bin/tool")
    (root / "README").write_text("read me")
    (root / "README").chmod(0o640)
    (root / "empty").touch()
    (root / "link").symlink_to("bin/tool")
    (root / "away").symlink_to("/etc/passwd")
    os.makedirs(os.fsencode(root) + b"/\xff\xfe")
    return root


def build(cache: Path, root: Path, limits: Limits | None = None, cancel: Cancel | None = None) -> Disk:
    """The disk of `root`, owned by 5:6, in a cache at `cache`."""
    return build_tree_disk(
        ImageCache(cache), root, owner=(5, 6), limits=limits or Limits(), cancel=cancel or Cancel()
    )


def test_a_directory_comes_back_with_set_owner_and_time(tmp_path: Path) -> None:
    root = make_skill(tmp_path / "skill")
    disk = build(tmp_path / "cache", root)
    check_ext4(disk.path)
    assert disk.size_bytes < 4 << 20
    with mounted(disk.path, tmp_path / "mnt") as mount:
        found, original = facts_below(mount), facts_below(root)
    assert found.keys() == original.keys()
    for name, facts in found.items():
        theirs = original[name]
        assert (facts.kind, facts.size, facts.digest, facts.target, facts.group, facts.links) == (
            theirs.kind, theirs.size, theirs.digest, theirs.target, theirs.group, theirs.links,
        )  # fmt: skip
        assert (facts.uid, facts.gid, facts.mtime_ns) == (5, 6, EPOCH_NS)
        assert facts.mode == theirs.mode & ~(stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX)


def test_no_kernel_mounts_it_for_writing(tmp_path: Path) -> None:
    disk = build(tmp_path / "cache", make_skill(tmp_path / "skill"))
    with mounted(disk.path, tmp_path / "mnt"):
        out = run("mount", "-o", "remount,rw", tmp_path / "mnt", ok=(0, 1, 32))
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "mnt/new").touch()
        assert out is not None


def test_the_same_contents_are_the_same_disk_and_others_are_not(tmp_path: Path) -> None:
    root = make_skill(tmp_path / "a")
    first = build(tmp_path / "cache", root)
    run("cp", "-r", "--preserve=mode,links", root, tmp_path / "b")
    assert build(tmp_path / "cache", tmp_path / "b") == first
    other = build(tmp_path / "other", tmp_path / "b")
    assert other.path.read_bytes() == first.path.read_bytes()
    (root / "README").chmod(0o600)
    assert build(tmp_path / "cache", root).digest != first.digest


def test_what_a_disk_cannot_hold_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    root = make_skill(tmp_path / "skill")
    cache = tmp_path / "cache"
    with pytest.raises(NotFound, match="nowhere"):
        build(cache, tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="not a directory"):
        build(cache, root / "README")
    with pytest.raises(Exhausted, match="more than 3 files"):
        build(cache, root, Limits(entries=3))
    with pytest.raises(Exhausted, match="more than 1000 bytes"):
        build(cache, root, Limits(unpacked_bytes=1000))
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(Cancelled):
        build(cache, root, cancel=cancel)
    os.mkfifo(root / "fifo")
    with pytest.raises(InvalidInput, match="fifo is no file"):
        build(cache, root)
    assert list((cache / "disks").iterdir()) == list((cache / "tmp").iterdir()) == []
