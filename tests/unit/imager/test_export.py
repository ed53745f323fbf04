"""Exports read by other people's programs, and by our own importer: nothing is lost on the way."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidInput
from services.imager import cpio
from services.imager.cache import ImageCache
from services.imager.compression import COMPRESSIONS, Compression, compressing, compression_from
from services.imager.export import Export, ExportFormat, pieces
from services.imager.limits import Cancel
from services.imager.pull import ImageStore
from services.imager.registry import RegistrySettings
from tests.imager_images import (
    Item,
    build_ext4,
    directory,
    hardlink,
    make_layout,
    make_tar,
    need,
    run,
    symlink,
)

CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
ITEMS = [
    directory(b"./", mode=0o711, uid=3),
    directory(b"d", mode=0o1777, uid=70_000, gid=3_000_000),
    Item(name=b"d/empty"),
    Item(name=b"d/file", data=os.urandom(100_001), mode=0o4755, uid=1, gid=2, mtime_ns=5_000_000_001),
    hardlink(b"a-link", b"d/file"),
    symlink(b"d/long", b"x" * 3000),
    Item(name=b"n\xff\xfe", data=b"not UTF-8"),
    Item(name=b"d/" + b"n" * 250, data=b"long name"),
    Item(name=b"null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
    Item(name=b"sda", kind=tarfile.BLKTYPE, device=(8, 0)),
    Item(name=b"pipe", kind=tarfile.FIFOTYPE),
    Item(name=b"cap", data=b"x", xattrs={b"security.capability": CAPABILITY, b"user.a": b"\xff\n"}),
    Item(name=b"old", mtime_ns=-1_500_000_000),
]


def sparse_tar(where: Path) -> bytes:
    """What GNU tar makes of a file with holes at its start, in its middle and at its end."""
    with (where / "holes").open("wb") as file:
        for at in (1 << 20, 3 << 20):
            file.seek(at)
            file.write(b"data" * 1000)
        file.truncate(9 << 20)
    return subprocess.run(
        [need("tar", "tar"), "-cS", "--format=posix", "--pax-option=delete=atime,delete=ctime", "holes"],
        cwd=where, capture_output=True, check=True,
    ).stdout  # fmt: skip


def export_of(where: Path, tars: Sequence[bytes], form: ExportFormat, how: Compression = "none") -> bytes:
    """An export of the image of these layers."""
    images = ImageStore(ImageCache(where / "cache"), RegistrySettings())
    image = images.pull(f"oci:{make_layout(where / 'layout', tars)}:t")
    out = io.BytesIO()
    Export(store=images, image=image, format=form, compression=how).write(out, Cancel())
    assert list((where / "cache/tmp").iterdir()) == []
    return out.getvalue()


def test_a_tar_archive_imported_again_gives_the_same_image(tmp_path: Path) -> None:
    upper = [Item(name=b"d/.wh.empty"), Item(name=b"null", data=b"a file now")]
    layers = [make_tar(ITEMS), make_tar(upper), sparse_tar(tmp_path)]
    exported = export_of(tmp_path, layers, ExportFormat.TAR)
    assert len(exported) < 1 << 20, "holes are left out"
    again = export_of(tmp_path / "again", [exported], ExportFormat.TAR)
    assert again == exported
    # The order of the files in the archive is that of their names, so their places on the disk differ
    # from those of the first import, but not from those of the second.
    build_ext4(tmp_path / "one.ext4", [exported], size_bytes=32 << 20)
    build_ext4(tmp_path / "two.ext4", [again], size_bytes=32 << 20)
    assert (tmp_path / "one.ext4").read_bytes() == (tmp_path / "two.ext4").read_bytes()


def test_gnu_tar_unpacks_an_exported_archive(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("owners and devices need root")
    exported = export_of(tmp_path, [make_tar(ITEMS), sparse_tar(tmp_path)], ExportFormat.TAR)
    (tmp_path / "x.tar").write_bytes(exported)
    root = tmp_path / "root"
    root.mkdir()
    run(need("tar", "tar"), "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", tmp_path / "x.tar",
        "-C", root)  # fmt: skip
    file = (root / "d/file").stat()
    assert (file.st_mode & 0o7777, file.st_uid, file.st_gid, file.st_nlink) == (0o4755, 1, 2, 2)
    assert file.st_mtime_ns == 5_000_000_001
    assert (root / "a-link").read_bytes() == (root / "d/file").read_bytes() == ITEMS[3].data
    assert (root / "d").stat().st_gid == 3_000_000
    assert os.readlink(root / "d/long") == "x" * 3000
    assert os.getxattr(root / "cap", "security.capability") == CAPABILITY
    assert os.getxattr(root / "cap", "user.a") == b"\xff\n"
    assert (root / os.fsdecode(b"n\xff\xfe")).read_bytes() == b"not UTF-8"
    holes = (root / "holes").stat()
    assert (holes.st_size, holes.st_blocks * 512 < 1 << 20) == (9 << 20, True)
    assert (root / "holes").read_bytes() == (tmp_path / "holes").read_bytes()
    assert (root / "null").stat().st_rdev == os.makedev(1, 3)


def test_an_initramfs_holds_every_file_and_hard_links_once(tmp_path: Path) -> None:
    exported = export_of(tmp_path, [make_tar(ITEMS), sparse_tar(tmp_path)], ExportFormat.INITRAMFS)
    entries = {os.fsencode(entry.name): entry for entry in cpio.read_archive(exported)}
    assert entries[b"a-link"].content == ITEMS[3].data
    assert entries[b"d/file"].content == b"", "the kernel takes the content from the other name"
    assert entries[b"n\xff\xfe"].content == b"not UTF-8"
    assert entries[b"holes"].content == (tmp_path / "holes").read_bytes()
    assert (entries[b"d"].mode, entries[b"d"].uid) == (0o041777, 70_000)
    assert entries[b"null"].device == (1, 3)
    names = list(entries)
    assert names.index(b"d") < names.index(b"d/file")


def test_cpio_unpacks_an_exported_initramfs(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("devices need root")
    (tmp_path / "x.cpio").write_bytes(export_of(tmp_path, [make_tar(ITEMS)], ExportFormat.INITRAMFS))
    root = tmp_path / "root"
    root.mkdir()
    with (tmp_path / "x.cpio").open("rb") as archive:
        subprocess.run([need("cpio", "cpio"), "-idm", "--quiet"], cwd=root, stdin=archive, check=True)
    assert (root / "a-link").read_bytes() == (root / "d/file").read_bytes() == ITEMS[3].data
    assert (root / "a-link").stat().st_ino == (root / "d/file").stat().st_ino


def test_a_file_that_no_initramfs_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 5 << 30)
    tar = subprocess.run(
        ["tar", "-cS", "--format=posix", "huge"], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    with pytest.raises(InvalidInput, match="'huge' has 5368709120 bytes"):
        export_of(tmp_path, [tar], ExportFormat.INITRAMFS)


TOOLS = {"gzip": ("gzip", "-dc"), "zstd": ("zstd", "-dcq"), "lz4": ("lz4", "-dc")}


@pytest.mark.parametrize("how", COMPRESSIONS)
@pytest.mark.parametrize("size", [0, 1, 100_000, (8 << 20) + 5, 16 << 20])
def test_the_usual_tools_unpack_each_compression(how: Compression, size: int) -> None:
    data = (os.urandom(50_000) + bytes(100_000)) * (size // 150_000 + 1)
    data = data[:size]
    packed, twice = io.BytesIO(), io.BytesIO()
    with compressing(packed, how) as out:
        for at in range(0, size, 700_001):
            out.write(data[at : at + 700_001])
    with compressing(twice, how) as out:
        out.write(data)
    unpacked = packed.getvalue()
    if how != "none":
        program, option = TOOLS[how]
        unpacked = subprocess.run(
            [need(program, program), option], input=packed.getvalue(), capture_output=True, check=True
        ).stdout
    assert unpacked == data
    if how in ("none", "lz4"):  # zlib's and zstd's blocks may end where a write ended
        assert packed.getvalue() == twice.getvalue()


def test_a_zstd_export_says_no_window_that_linux_refuses() -> None:
    packed = io.BytesIO()
    with compressing(packed, "zstd") as out:
        out.write(os.urandom(20 << 20))
    assert zstandard.get_frame_parameters(packed.getvalue()).window_size <= 1 << 27


@pytest.mark.parametrize("text", ["rar", "GZIP", " zstd"])
def test_an_unknown_compression_is_refused_with_a_list(text: str) -> None:
    with pytest.raises(InvalidInput, match="none, gzip, zstd, lz4"):
        compression_from(text)
    assert compression_from("") == "none"


@given(parts=st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=6))
def test_pieces_of_a_sparse_file_are_the_file(parts: list[tuple[bool, int]]) -> None:
    expected = b"".join((b"x" if data else b"\0") * (blocks * 4096) for data, blocks in parts)
    with tempfile.TemporaryFile(buffering=0) as file:
        for data, blocks in parts:
            if data:
                file.write(b"x" * (blocks * 4096))
            else:
                file.seek(blocks * 4096, os.SEEK_CUR)
        file.truncate(len(expected))
        found = list(pieces(file))
    assert b"".join(bytes(part) if isinstance(part, int) else part for part in found) == expected
    assert all(part for part in found)
