"""Layers go in, an ext4 image comes out; e2fsck, dumpe2fs, debugfs and the kernel judge it.

Every image is checked by `e2fsck -fn`; the kernel mounts it and every file is compared with what
the layers say: type, mode, owner, mtime, contents, extended attributes, hard links.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import Exhausted, InvalidInput
from services.imager.ext4 import Ext4Writer
from services.imager.layers import LayerMerger, LayerSource
from services.imager.limits import Limits
from tests.imager_images import (
    Item,
    build_ext4,
    check_ext4,
    directory,
    hardlink,
    make_tar,
    missing,
    mounted,
    need,
    run,
    symlink,
)
from tests.tree_facts import Facts, facts_below

NOBODY = 0xFFFFFFFF  # ACL_UNDEFINED_ID
ACL_HEADER = struct.pack("<I", 2)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL as getxattr(2) gives it."""
    return ACL_HEADER + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def expected_facts(items: list[Item]) -> dict[bytes, Facts]:
    """What a mount must show of members whose parents come before them, in the simple cases."""
    kinds = {
        tarfile.REGTYPE: "file",
        tarfile.DIRTYPE: "directory",
        tarfile.SYMTYPE: "symlink",
        tarfile.CHRTYPE: "chardev",
        tarfile.BLKTYPE: "blockdev",
        tarfile.FIFOTYPE: "fifo",
    }
    nodes: dict[bytes, tuple[Item, int]] = {}
    for number, item in enumerate(items):
        name = item.name.rstrip(b"/")
        if item.kind == tarfile.LNKTYPE:
            nodes[name] = nodes[item.link]
        else:
            nodes[name] = (item, number)
    found = {}
    for name, (item, number) in nodes.items():
        group = frozenset(other for other, (_, same) in nodes.items() if same == number)
        kind = kinds[item.kind]
        found[name] = Facts(
            kind=kind,
            mode=0o777 if kind == "symlink" else item.mode,
            uid=item.uid,
            gid=item.gid,
            mtime_ns=item.mtime_ns,
            size=len(item.data) if kind == "file" else 0,
            digest=hashlib.sha256(item.data).hexdigest() if kind == "file" else "",
            target=item.link if kind == "symlink" else b"",
            device=item.device if kind in ("chardev", "blockdev") else (0, 0),
            links=0 if kind == "directory" else len(group),
            xattrs=tuple(sorted(item.xattrs.items())),
            group=group,
        )
    return found


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., dict[bytes, Facts]]:
    """Builds layers, checks the image, and returns what the kernel sees in it."""

    def build(*layers: list[Item], **options: Any) -> dict[bytes, Facts]:
        image = tmp_path / "image.ext4"
        build_ext4(image, [make_tar(items) for items in layers], **options)
        check_ext4(image)
        with mounted(image, tmp_path / "mnt") as root:
            return facts_below(root)

    return build


EVERYTHING = [
    directory(b".", mode=0o711, uid=1, gid=2),
    directory(b"etc", mode=0o755),
    Item(name=b"etc/passwd", data=b"root:x:0:0::/root:/bin/sh\n", mode=0o600, mtime_ns=10**18 + 1),
    Item(name=b"etc/empty", mode=0o000),
    Item(name=b"etc/setuid", data=b"#!\n", mode=0o4755, uid=1000, gid=1000),
    Item(name=b"etc/one-block", data=b"x" * 4096),
    Item(name=b"etc/one-more", data=b"y" * 4097),
    Item(name=b"etc/large-owner", data=b"z", uid=70_000, gid=4_000_000_000),
    directory(b"tmp", mode=0o1777),
    symlink(b"tmp/short", b"../etc/passwd"),
    symlink(b"tmp/s59", b"a" * 59),
    symlink(b"tmp/s60", b"b" * 60),
    symlink(b"tmp/s4095", b"c" * 4095),
    symlink(b"tmp/dangling", b"/nowhere", uid=5, gid=6),
    Item(name=b"tmp/fifo", kind=tarfile.FIFOTYPE, mode=0o620),
    Item(name=b"tmp/null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
    Item(name=b"tmp/big-minor", kind=tarfile.BLKTYPE, device=(259, 70_000), mode=0o660),
    hardlink(b"tmp/linked", b"etc/passwd"),
    hardlink(b"tmp/linked-symlink", b"tmp/short"),
    Item(name=b"tmp/caps", data=b"x", xattrs={b"security.capability": b"\x01\0\0\x02\0\x20" + bytes(14)}),
    Item(
        name=b"tmp/user", data=b"x", xattrs={b"user.a": b"1", b"user.b": b"", b"user.\xc3\xa9": b"\0\n=\xff"}
    ),
    Item(name=b"tmp/many", data=b"x", xattrs={b"user.%d" % i: b"v" * 40 for i in range(50)}),
    Item(name=b"tmp/large-value", data=b"x", xattrs={b"user.large": b"v" * 3900, b"trusted.t": b"t"}),
    directory(b"tmp/labelled", xattrs={b"user.on": b"directory"}),
    Item(name=b"tmp/\xff\xfe not utf-8 \n newline", data=b"raw"),
    Item(name=b"tmp/" + b"n" * 255, data=b"long"),
    Item(name=b"tmp/old", data=b"old", mtime_ns=-1_000_000_000),
    Item(name=b"tmp/far", data=b"far", mtime_ns=10_000_000_000 * 10**9),
]


def test_everything_that_a_layer_can_hold_comes_back(built: Callable[..., dict[bytes, Facts]]) -> None:
    found = built(EVERYTHING)
    expected = expected_facts(EVERYTHING)
    assert found.keys() == expected.keys()
    for name, facts in expected.items():
        assert found[name] == facts, name


def test_posix_acls_are_stored_so_that_the_kernel_reads_them_back(
    built: Callable[..., dict[bytes, Facts]],
) -> None:
    access = acl((1, 6, NOBODY), (2, 4, 1234), (4, 4, NOBODY), (16, 6, NOBODY), (32, 0, NOBODY))
    found = built(
        [
            Item(name=b"f", data=b"x", mode=0o660, xattrs={b"system.posix_acl_access": access}),
            directory(b"d", xattrs={b"system.posix_acl_default": access}),
        ]
    )
    assert dict(found[b"f"].xattrs) == {b"system.posix_acl_access": access}
    assert dict(found[b"d"].xattrs) == {b"system.posix_acl_default": access}


def test_attributes_of_other_systems_are_left_out(built: Callable[..., dict[bytes, Facts]]) -> None:
    found = built([Item(name=b"f", xattrs={b"com.apple.provenance": b"x", b"user.kept": b"y"})])
    assert found[b"f"].xattrs == ((b"user.kept", b"y"),)


@pytest.mark.parametrize("count", [0, 1, 100, 170, 1_000, 30_000])
def test_directories_of_any_length_are_complete_and_indexed(tmp_path: Path, count: int) -> None:
    items = [Item(name=b"d/entry-%06d" % i, data=b"x" if i % 100 == 0 else b"") for i in range(count)]
    image = tmp_path / "image.ext4"
    build_ext4(image, [make_tar([directory(b"d"), *items])])
    check_ext4(image)
    listed = run(need("debugfs", "e2fsprogs"), "-R", "ls -p /d", image)
    assert len(re.findall(r"/entry-\d{6}/", listed)) == count
    flags = re.search(r"Flags: (0x[0-9a-f]+)", run("debugfs", "-R", "stat /d", image))
    assert flags is not None
    assert bool(int(flags[1], 16) & 0x1000) == (count > 170)


def test_the_kernel_finds_every_name_through_the_index(tmp_path: Path) -> None:
    """Two levels of index nodes: names of 200 bytes fill 507 leaves soon."""
    names = [b"%05d-\xc3\xa9\xff" % i + b"x" * 191 for i in range(11_000)]
    image = tmp_path / "image.ext4"
    build_ext4(image, [make_tar([Item(name=b"d/" + name) for name in names], form=tarfile.GNU_FORMAT)])
    check_ext4(image)
    dump = run(need("debugfs", "e2fsprogs"), "-R", "htree_dump /d", image)
    assert "Indirect levels: 1" in dump
    with mounted(image, tmp_path / "mnt") as root:
        assert all((root / "d" / os.fsdecode(name)).exists() for name in names)
        assert not (root / "d" / "absent").exists()


def test_a_fragmented_sparse_file_has_an_extent_tree_and_its_holes(tmp_path: Path) -> None:
    """GNU tar itself makes the archive; 1,500 extents need two levels."""
    need("tar", "tar")
    source = tmp_path / "source"
    source.mkdir()
    with (source / "sparse").open("wb") as file:
        for i in range(1500):
            file.seek(i * 8 * 4096)
            file.write(b"%06d" % i * 10)
        file.truncate(6 * 10**7)
    expected = facts_below(source)[b"sparse"]
    for flags in (("--format=gnu",), ("--format=posix",), ("--format=posix", "--sparse-version=0.1"),
                  ("--format=posix", "--sparse-version=0.0")):  # fmt: skip
        archive = tmp_path / "a.tar"
        run("tar", "--sparse", *flags, "-cf", archive, "-C", source, "sparse")
        assert archive.stat().st_size < 10**7
        image = tmp_path / "image.ext4"
        build_ext4(image, [archive.read_bytes()])
        check_ext4(image)
        with mounted(image, tmp_path / "mnt") as root:
            found = facts_below(root)[b"sparse"]
            assert (found.size, found.digest) == (expected.size, expected.digest)
            assert (root / "sparse").stat().st_blocks * 512 < 10**7
        image.unlink()


def test_a_file_beyond_4_gib_of_data_is_whole(tmp_path: Path) -> None:
    """4.1 GiB in 34 extents; the tar is made of a pattern on the fly, never in memory."""
    size = (4 << 30) + (100 << 20) + 17
    header = tarfile.TarInfo("big")
    header.size = size
    head = header.tobuf(tarfile.GNU_FORMAT)
    chunk = bytes(range(256)) * 4096

    class Pattern:
        """The archive as a file."""

        def __init__(self) -> None:
            self._at = 0
            self._total = len(head) + size + -size % 512 + 1024

        def read(self, length: int) -> bytes:
            length = min(length, self._total - self._at, len(chunk))
            if self._at < len(head):
                data = head[self._at : self._at + length]
            elif self._at < len(head) + size:
                length = min(length, len(head) + size - self._at)
                offset = (self._at - len(head)) % 256
                data = (chunk[offset:] + chunk[:offset])[:length]
            else:
                data = bytes(length)
            self._at += len(data)
            return data

    digest, count = hashlib.sha256(), 0
    source = Pattern()
    while data := source.read(1 << 20):
        digest.update(data)
        count += len(data)
    image = tmp_path / "image.ext4"
    with (
        image.open("w+b", buffering=1 << 20) as file,
        Ext4Writer(file, uuid=bytes(16), hash_seed=bytes(16)) as writer,
    ):
        merger = LayerMerger(writer, Limits())
        name = f"sha256:{digest.hexdigest()}"
        merger.apply(LayerSource(digest=name, size=count, diff_id=name, blob=Pattern()))  # type: ignore[arg-type]
        writer.finish(merger.tree)
    try:
        check_ext4(image)
        stat_text = run(need("debugfs", "e2fsprogs"), "-R", "stat /big", image)
        assert f"Size: {size}" in stat_text
        with mounted(image, tmp_path / "mnt") as root, (root / "big").open("rb") as big:
            for at in (0, 1 << 27, (4 << 30) - 5, (4 << 30) + (100 << 20)):
                big.seek(at)
                assert big.read(17) == bytes((at + i) % 256 for i in range(17))
    finally:
        image.unlink()


@pytest.mark.parametrize("mib", [8, 127, 128, 129, 1024, 20_000, 300_000])
def test_the_size_asked_for_is_the_size_made(tmp_path: Path, mib: int) -> None:
    image = tmp_path / "image.ext4"
    made = build_ext4(image, [make_tar([Item(name=b"f", data=b"x" * 10_000)])], size_bytes=mib << 20)
    fields = check_ext4(image)
    assert made.size_bytes == image.stat().st_size == mib << 20
    assert int(fields["Free blocks"]) * 4096 > (mib << 20) * 0.7
    assert image.stat().st_blocks * 512 < 40 << 20


def test_free_room_comes_on_top_of_the_contents(tmp_path: Path) -> None:
    image = tmp_path / "image.ext4"
    build_ext4(image, [make_tar([Item(name=b"f", data=os.urandom(1 << 20))])], free_bytes=500 << 20)
    assert int(check_ext4(image)["Free blocks"]) * 4096 >= 500 << 20


def test_a_size_that_is_too_small_is_refused_with_the_size_needed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"needs \d+ bytes, 1048576 were asked for"):
        build_ext4(tmp_path / "i", [make_tar([Item(name=b"f", data=bytes(2 << 20))])], size_bytes=1 << 20)


def test_the_image_can_be_written_to_by_the_kernel_and_stays_sound(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        missing("mounting an image needs root and loop devices")
    image = tmp_path / "image.ext4"
    build_ext4(image, [make_tar([directory(b"d"), *(Item(name=b"d/%04d" % i) for i in range(2000))])],
               free_bytes=64 << 20)  # fmt: skip
    where = tmp_path / "mnt"
    where.mkdir()
    run("mount", "-o", "loop", image, where)
    try:
        for i in range(3000):
            (where / "d" / f"new-{i}").write_bytes(b"data" * 500)
        (where / "big").write_bytes(os.urandom(30 << 20))
        for i in range(0, 2000, 3):
            (where / "d" / f"{i:04d}").unlink()
        (where / "lost+found" / "x").mkdir()
    finally:
        run("umount", where)
    run(need("e2fsck", "e2fsprogs"), "-fn", image)


def test_the_same_layers_give_the_same_bytes_and_others_do_not(tmp_path: Path) -> None:
    tar = make_tar(EVERYTHING)
    for name, tars in (("a", [tar]), ("b", [tar]), ("c", [make_tar(EVERYTHING[:-1])])):
        build_ext4(tmp_path / name, tars)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_data_that_a_later_layer_replaces_is_a_hole_and_free(tmp_path: Path) -> None:
    image = tmp_path / "image.ext4"
    secret = os.urandom(8 << 20)
    keep = Item(name=b"keep", data=b"k" * 5000)
    lower = make_tar([Item(name=b"a", data=secret), keep, Item(name=b"b", data=secret)])
    build_ext4(image, [lower, make_tar([Item(name=b"a", data=b"new"), Item(name=b".wh.b")])])
    check_ext4(image)
    assert secret[:64] not in image.read_bytes()
    assert image.stat().st_blocks * 512 < 2 << 20
    with mounted(image, tmp_path / "mnt") as root:
        assert facts_below(root).keys() == {b".", b"a", b"keep"}
        assert (root / "a").read_bytes() == b"new"
        assert (root / "keep").read_bytes() == b"k" * 5000


def test_an_image_without_entries_is_an_empty_root(tmp_path: Path) -> None:
    for tars in ([], [make_tar([])], [b""]):
        build_ext4(tmp_path / "i", tars)
        check_ext4(tmp_path / "i")


def test_a_deep_tree_is_no_problem(tmp_path: Path) -> None:
    name = b"/".join([b"d"] * 2000)
    build_ext4(tmp_path / "i", [make_tar([Item(name=name, data=b"deep")])])
    check_ext4(tmp_path / "i")


def test_too_many_hard_links_are_refused(tmp_path: Path) -> None:
    links = [hardlink(b"l%d" % i, b"f") for i in range(65_000)]
    tar = make_tar([Item(name=b"f"), *links], form=tarfile.USTAR_FORMAT)
    with pytest.raises(InvalidInput, match="more than 65000 hard links"):
        build_ext4(tmp_path / "i", [tar])
    build_ext4(tmp_path / "i", [tar[: 512 * 65_000]])  # one header, and so one link, less
    check_ext4(tmp_path / "i")


def test_a_directory_with_more_than_65000_directories_is_sound(tmp_path: Path) -> None:
    items = [directory(b"d/%d" % i) for i in range(65_100)]
    build_ext4(tmp_path / "i", [make_tar(items, form=tarfile.USTAR_FORMAT)])
    check_ext4(tmp_path / "i")


def test_limits_end_the_work_with_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(Exhausted, match="raise the limit"):
        build_ext4(tmp_path / "i", [make_tar([Item(name=b"f", data=bytes(5 << 20))])],
                   limits=Limits(unpacked_bytes=1 << 20))  # fmt: skip
    with pytest.raises(Exhausted, match="more than 10 entries"):
        tar = make_tar([Item(name=b"%d" % i) for i in range(11)])
        build_ext4(tmp_path / "i", [tar], limits=Limits(entries=10))


names = st.binary(min_size=1, max_size=40).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..", b"lost+found")
    and not name.startswith(b".wh.")
)  # fmt: skip


@st.composite
def trees(draw: st.DrawFn) -> list[Item]:
    """Members of one layer, parents first, no name twice."""
    directories = [b""]
    taken: set[bytes] = set()
    files: list[bytes] = []
    items: list[Item] = []
    for _ in range(draw(st.integers(0, 25))):
        name = draw(st.sampled_from(directories)) + draw(names)
        if name in taken:
            continue
        taken.add(name)
        common: dict[str, Any] = {
            "name": name,
            "mode": draw(st.integers(0, 0o7777)),
            "uid": draw(st.integers(0, 2**31 - 1)),
            "gid": draw(st.sampled_from([0, 1000, 65_536])),
            "mtime_ns": draw(st.integers(0, 2**33)) * 10**9 + draw(st.integers(0, 10**9 - 1)),
        }
        keys = st.sampled_from([b"user.a", b"user.b", b"user.longer-name", b"security.x", b"trusted.t"])
        kind = draw(st.sampled_from("dddffffffslcp"))
        if kind in "df":
            common["xattrs"] = draw(st.dictionaries(keys, st.binary(max_size=120), max_size=4))
        if kind == "d":
            items.append(directory(**common))
            directories.append(name + b"/")
        elif kind == "f":
            size = draw(st.sampled_from([0, 1, 100, 4095, 4096, 4097, 20_000]))
            items.append(Item(data=(name * (size // len(name) + 1))[:size], **common))
            files.append(name)
        elif kind == "s":
            target = draw(st.binary(min_size=1, max_size=200).filter(lambda text: b"\0" not in text))
            items.append(symlink(target=target, **common))
        elif kind == "l" and files:
            items.append(hardlink(name, draw(st.sampled_from(files))))
        elif kind == "c":
            device = (draw(st.integers(0, 4095)), draw(st.integers(0, 2**20 - 1)))
            items.append(Item(kind=tarfile.CHRTYPE, device=device, **common))
        elif kind == "p":
            items.append(Item(kind=tarfile.FIFOTYPE, **common))
        else:
            taken.discard(name)
    return items


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(items=trees())
def test_any_tree_comes_back_as_it_went_in(
    tmp_path_factory: pytest.TempPathFactory, items: list[Item]
) -> None:
    place = tmp_path_factory.mktemp("tree")
    image = place / "image.ext4"
    build_ext4(image, [make_tar(items)])
    check_ext4(image)
    with mounted(image, place / "mnt") as root:
        found = facts_below(root)
    del found[b"."]
    assert found == expected_facts(items)
    image.unlink()
