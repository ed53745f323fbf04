"""Trees as archives: what we pack comes back equal; what a hostile box packs stays inside the target."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import tarfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Corrupt, Denied, InvalidInput, VoidboxError, WrongState
from voidbox.archive import MAX_HEADER_BYTES, pack, read_file, unpack


async def pieces(data: bytes, length: int = 700) -> AsyncIterator[bytes]:
    for at in range(0, len(data), length):
        yield data[at : at + length]


def archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("length", [1, 511, 100_000])
async def test_every_form_is_unpacked_whatever_the_pieces(tmp_path: Path, form: int, length: int) -> None:
    long = "d/" * 20 + "x" * 90
    data = archive(
        (member("d", tarfile.DIRTYPE, mode=0o755), b""),
        (member(long), b"long name"),
        (member("run", mode=0o4755), b"#!/bin/sh\n"),
        (member("hard", tarfile.LNKTYPE, "run"), b""),
        (member("soft", tarfile.SYMTYPE, "d"), b""),
        form=form,
    )
    result = await unpack(pieces(data, length), tmp_path)
    assert result.entries == 5
    assert (tmp_path / long).read_text() == "long name"
    # Set-user-id bits of a box mean nothing here.
    assert (tmp_path / "run").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "hard").samefile(tmp_path / "run")
    assert os.readlink(tmp_path / "soft") == "d"


async def test_what_is_packed_comes_back_equal_and_packing_is_deterministic(tmp_path: Path) -> None:
    source, target = tmp_path / "s", tmp_path / "t"
    (source / "sub/empty").mkdir(parents=True)
    (source / "sub/big").write_bytes(os.urandom(200_001))
    (source / "ünïcode").write_text("x")
    (source / ("n" * 200)).write_text("long")
    (source / "link").symlink_to("sub/big")
    target.mkdir()
    data = b"".join(pack(source))
    assert data == b"".join(pack(source))
    await unpack(pieces(data), target)
    assert b"".join(pack(target)) == data


HOSTILE: list[tuple[str, Iterable[tuple[tarfile.TarInfo, bytes]]]] = [
    ("absolute", [(member("/etc/evil"), b"x")]),
    ("climbing", [(member("../evil"), b"x")]),
    ("climbing inside", [(member("a/../../evil"), b"x")]),
    ("absolute link", [(member("l", tarfile.SYMTYPE, "/etc/passwd"), b"")]),
    ("climbing link", [(member("a/l", tarfile.SYMTYPE, "../../evil"), b"")]),
    (
        "climbing through another link",
        [
            (member("a/b/c/x", tarfile.SYMTYPE, "../../../t"), b""),
            (member("y", tarfile.SYMTYPE, "a/b/c/x/../.."), b""),
        ],
    ),
    ("climbing hard link", [(member("h", tarfile.LNKTYPE, "../outside"), b"")]),
    ("absolute hard link", [(member("h", tarfile.LNKTYPE, "/etc/passwd"), b"")]),
    ("device", [(member("null", tarfile.CHRTYPE), b"")]),
    ("fifo", [(member("pipe", tarfile.FIFOTYPE), b"")]),
]


@pytest.mark.parametrize(("name", "members"), HOSTILE, ids=[name for name, _ in HOSTILE])
async def test_what_would_leave_the_target_is_refused(
    tmp_path: Path, name: str, members: Iterable[tuple[tarfile.TarInfo, bytes]]
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "outside").write_text("mine")
    with pytest.raises(Denied):
        await unpack(pieces(archive(*members)), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "target"]
    assert (tmp_path / "outside").read_text() == "mine"


async def test_links_that_are_there_are_not_followed(tmp_path: Path) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    (target / "d").symlink_to(outside)
    (target / "f").symlink_to(outside / "file")
    with pytest.raises(WrongState):
        await unpack(pieces(archive((member("d/evil"), b"x"))), target)
    await unpack(pieces(archive((member("f"), b"new"))), target)
    assert list(outside.iterdir()) == []
    assert not (target / "f").is_symlink()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 512,
        archive((member("f"), b"x" * 3000))[:2000],
        archive((member("f"), b"x" * 3000))[:512],
    ],
    ids=["empty", "no header", "cut content", "cut after header"],
)
async def test_a_damaged_archive_is_refused_and_no_partial_file_stays(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(Corrupt):
        await unpack(pieces(data), tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    info = member("pax", tarfile.XHDTYPE)
    info.size = MAX_HEADER_BYTES + 1
    with pytest.raises(Corrupt, match="header of"):
        await unpack(pieces(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)), tmp_path)


@settings(deadline=None)  # the machine may be busy
@given(st.binary(max_size=2048))
async def test_no_bytes_do_more_than_fail(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    target = tmp_path_factory.mktemp("fuzz")
    with contextlib.suppress(VoidboxError):
        await unpack(pieces(data), target)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 1535), st.binary(min_size=1, max_size=8))
async def test_damaged_headers_do_no_more_than_fail(
    tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes
) -> None:
    target = tmp_path_factory.mktemp("fuzz")
    data = bytearray(archive((member("ü" * 120), b"content"), (member("s", tarfile.SYMTYPE, "x"), b"")))
    data[at : at + len(junk)] = junk
    with contextlib.suppress(VoidboxError):
        await unpack(pieces(bytes(data)), target)
    for path in target.rglob("*"):
        assert path.resolve().is_relative_to(target.resolve())


def test_what_cannot_be_copied_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="pipe"):
        list(pack(tmp_path))
    with pytest.raises(InvalidInput, match="pipe"):
        list(read_file(tmp_path / "pipe"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "zsocket"))
        os.unlink(tmp_path / "pipe")
        with pytest.raises(InvalidInput, match="zsocket"):
            list(pack(tmp_path))
    with pytest.raises(InvalidInput, match="none"):
        list(read_file(tmp_path / "none"))
