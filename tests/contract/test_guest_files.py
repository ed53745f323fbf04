"""Files of a box: whole or not at all, and never outside its root.

A real agent runs as an ordinary process; its file calls act in a temporary directory that
programs of a hostile box could have filled with anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import random
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from tests.contract.guest_process import METADATA, AgentProcess, Client, reason
from voidbox.guest.v1 import guest_pb2 as pb

MIB = 1 << 20


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    """One agent for all tests of this file."""
    with AgentProcess() as process:
        yield process


@pytest.fixture
def root(agent: AgentProcess) -> Iterator[Path]:
    """The box's root, emptied, and a secret beside it that nothing may reach."""
    (agent.directory / "secret").write_bytes(b"outside")
    yield agent.files
    assert (agent.directory / "secret").read_bytes() == b"outside"
    assert sorted(one.name for one in agent.directory.iterdir() if not one.is_socket()) == [
        "files",
        "log",
        "run",
        "secret",
    ]
    for path in sorted(agent.files.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


async def fails(awaitable: Any, code: grpc.StatusCode, why: str = "") -> aio.AioRpcError:
    """The call fails with this code and reason."""
    with pytest.raises(aio.AioRpcError) as caught:
        await awaitable
    assert caught.value.code() is code, caught.value.details()
    assert not why or reason(caught.value).reason == why
    return caught.value


async def outcome(awaitable: Any) -> tuple[grpc.StatusCode, str]:
    """How a call ends."""
    try:
        await awaitable
    except aio.AioRpcError as error:
        return error.code(), str(error.details())
    return grpc.StatusCode.OK, ""


async def stat_of(client: Client, path: str) -> pb.FileInfo:
    """StatFile."""
    answer = await client.stub.StatFile(pb.StatFileRequest(path=path), metadata=METADATA)
    found: pb.FileInfo = answer.file
    return found


async def test_what_is_written_is_read_back_in_parts_too(agent: AgentProcess, root: Path) -> None:
    data = random.Random(4).randbytes(3 * MIB + 17)
    async with agent.client() as client:
        answer = await client.write("/a/b/c.bin", data, make_parents=True, mode=0o640)
        assert answer.size_bytes == len(data)
        assert await client.read("/a/b/c.bin") == data
        assert await client.read("/a/b/c.bin", offset=1000, length=70000) == data[1000:71000]
        assert await client.read("/a/b/c.bin", offset=len(data) + 5) == b""
        assert (root / "a/b/c.bin").read_bytes() == data
        found = await stat_of(client, "/a/b/c.bin")
        assert (found.size_bytes, found.mode, found.type) == (len(data), 0o640, pb.FILE_TYPE_REGULAR)
        assert (found.uid, found.gid) == (os.geteuid(), os.getegid())
        await client.write("/empty", b"")
        assert (root / "empty").read_bytes() == b""


async def test_replacing_keeps_the_mode_and_in_place_writes_change_a_part(
    agent: AgentProcess, root: Path
) -> None:
    async with agent.client() as client:
        await client.write("/f", b"0123456789", mode=0o750)
        inode = (root / "f").stat().st_ino
        await client.write("/f", b"abcdefghij")
        assert stat.S_IMODE((root / "f").stat().st_mode) == 0o750
        assert (root / "f").stat().st_ino != inode
        await client.write("/f", b"XY", offset=3)
        await client.write("/f", b"!", offset=-1)
        assert (root / "f").read_bytes() == b"abcXYfghij!"
        await client.write("/new-log", b"line\n", offset=-1)
        assert (root / "new-log").read_bytes() == b"line\n"
        await fails(client.write("/missing", b"x", offset=5), grpc.StatusCode.NOT_FOUND)
        await fails(client.write("/f", b"x", offset=-2), grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(
    agent: AgentProcess, root: Path
) -> None:
    async with agent.client() as client:
        await client.write("/f", b"old")
        call = client.stub.WriteFile(metadata=METADATA)
        await call.write(pb.WriteFileRequest(header=pb.WriteFileHeader(path="/f")))
        for _ in range(8):
            await call.write(pb.WriteFileRequest(data=bytes(65536)))
        call.cancel()
        big = [
            pb.WriteFileRequest(header=pb.WriteFileHeader(path="/f")),
            pb.WriteFileRequest(data=bytes(65537)),
        ]
        await fails(client.stub.WriteFile(iter(big), metadata=METADATA), grpc.StatusCode.INVALID_ARGUMENT)
        for _ in range(200):  # the cancelled one ends in its own time
            if len(list(root.iterdir())) == 1:
                break
            await client.sh("true")
        assert [one.name for one in root.iterdir()] == ["f"]
        assert (root / "f").read_bytes() == b"old"


async def test_missing_things_say_so(agent: AgentProcess, root: Path) -> None:
    (root / "dir").mkdir()
    os.mkfifo(root / "fifo")
    (root / "file").write_bytes(b"x")
    async with agent.client() as client:
        error = await fails(client.read("/no/such"), grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        assert reason(error).metadata["path"] == "/no/such"
        await fails(client.read("/dir"), grpc.StatusCode.FAILED_PRECONDITION, "IS_A_DIRECTORY")
        await fails(client.read("/fifo"), grpc.StatusCode.FAILED_PRECONDITION, "NOT_A_FILE")
        await fails(client.write("/dir", b""), grpc.StatusCode.FAILED_PRECONDITION, "IS_A_DIRECTORY")
        await fails(client.write("/no/parent", b""), grpc.StatusCode.NOT_FOUND)
        await fails(client.write("/file/x", b"", make_parents=True), grpc.StatusCode.FAILED_PRECONDITION)
        for path in ("", "relative", "/", "/dir/..", "/dir/.", "/a\0b", "/" + "x" * 5000):
            await fails(client.write(path, b""), grpc.StatusCode.INVALID_ARGUMENT)
        await fails(client.write("/" + "n" * 256, b""), grpc.StatusCode.INVALID_ARGUMENT, "NAME_TOO_LONG")


async def test_directories_are_made_listed_in_pages_renamed_and_removed(
    agent: AgentProcess, root: Path
) -> None:
    async with agent.client() as client:

        async def make(path: str, **fields: Any) -> None:
            await client.stub.MakeDirectory(pb.MakeDirectoryRequest(path=path, **fields), metadata=METADATA)

        async def remove(path: str, **fields: Any) -> None:
            await client.stub.RemoveFile(pb.RemoveFileRequest(path=path, **fields), metadata=METADATA)

        await make("/d", mode=0o700)
        await fails(make("/d"), grpc.StatusCode.ALREADY_EXISTS)
        await make("/d", make_parents=True)
        await make("/x/y/z", make_parents=True)
        await fails(make("/no/such"), grpc.StatusCode.NOT_FOUND)
        assert stat.S_IMODE((root / "d").stat().st_mode) == 0o700
        for number in range(25):
            (root / "d" / f"f{number:02}").write_bytes(b"x" * number)
        os.symlink("/etc/passwd", root / "d" / "link")
        names: list[str] = []
        token = ""
        while True:
            request = pb.ListDirectoryRequest(path="/d", page_size=10, page_token=token)
            page = await client.stub.ListDirectory(request, metadata=METADATA)
            assert len(page.files) <= 10
            names += [one.path for one in page.files]
            token = page.next_page_token
            if not token:
                break
        assert names == sorted(one.name for one in (root / "d").iterdir())
        assert page.files[-1].link_target == "/etc/passwd"
        await fails(remove("/d"), grpc.StatusCode.FAILED_PRECONDITION, "NOT_EMPTY")
        rename = pb.RenameFileRequest(from_path="/d", to_path="/x/moved")
        await client.stub.RenameFile(rename, metadata=METADATA)
        assert (root / "x/moved/f03").read_bytes() == b"xxx"
        await remove("/x", recursive=True)
        await fails(remove("/x", recursive=True), grpc.StatusCode.NOT_FOUND)
        assert list(root.iterdir()) == []


# Escapes. Each trap is made in the box's root as its programs could make it.


def linked(root: Path, name: str, target: str | Path) -> str:
    """Make a link in the root; its path in the box."""
    os.symlink(target, root / name)
    return f"/{name}"


def chained(root: Path) -> str:
    """A link to a link that climbs."""
    linked(root, "a", "b")
    linked(root, "b", "../../..")
    return "/a"


def nested(root: Path) -> str:
    """A directory to climb out of."""
    (root / "m").mkdir()
    return "/m"


TRAPS: dict[str, Callable[[Path], str]] = {
    "link-to-parent": lambda root: linked(root, "up", "..") + "/secret",
    "link-to-absolute": lambda root: linked(root, "abs", root.parent) + "/secret",
    "final-link": lambda root: linked(root, "final", root.parent / "secret"),
    "link-chain": lambda root: chained(root) + f"{root.parent}/secret",
    "dots": lambda root: "/../secret",
    "many-dots": lambda root: "/../../../../../../../.." + str(root.parent / "secret"),
    "dots-in-the-middle": lambda root: nested(root) + "/../../secret",
    "magic-root": lambda root: linked(root, "magic", "/proc/self/root") + f"{root.parent}/secret",
}


@pytest.mark.parametrize("trap", TRAPS)
async def test_no_path_leaves_the_root(agent: AgentProcess, root: Path, trap: str) -> None:
    path = TRAPS[trap](root)
    async with agent.client() as client:
        allowed = (
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.FAILED_PRECONDITION,
        )
        with pytest.raises(aio.AioRpcError) as caught:
            await client.read(path)
        assert caught.value.code() in allowed
        for attempt in (
            lambda: client.write(path, b"owned", offset=0),
            lambda: client.stub.RemoveFile(
                pb.RemoveFileRequest(path=path, recursive=True), metadata=METADATA
            ),
            lambda: client.stub.ListDirectory(
                pb.ListDirectoryRequest(path=os.path.dirname(path)), metadata=METADATA
            ),
            lambda: client.read_tree(path),
            lambda: client.write(path, b"owned", make_parents=True),
            lambda: client.stub.MakeDirectory(
                pb.MakeDirectoryRequest(path=path + "/x", make_parents=True), metadata=METADATA
            ),
            lambda: client.stub.RenameFile(
                pb.RenameFileRequest(from_path=path, to_path="/taken"), metadata=METADATA
            ),
            lambda: client.write_tree(os.path.dirname(path), tar_of(entry("secret", b"owned"))),
        ):
            code, _ = await outcome(attempt())
            # It may act inside the root, where the path leads when it is clamped; the fixture proves no more.
            assert code is not grpc.StatusCode.INTERNAL
        assert (root.parent / "secret").read_bytes() == b"outside"


async def test_the_agents_own_files_are_refused_wherever_a_path_comes_from() -> None:
    """With / as the root, as in a guest without a root disk."""
    with AgentProcess("/") as process:
        async with process.client() as client:
            own = process.directory / "run"
            link = process.directory / "link"
            link.symlink_to(own)
            for path in (
                f"{own}/agent.sock",
                f"{link}/agent.sock",
                f"{own}",
                f"{process.directory}/./run/../run/x",
            ):
                for attempt in (
                    client.stub.StatFile(pb.StatFileRequest(path=path), metadata=METADATA),
                    client.write(path, b""),
                    client.stub.RemoveFile(pb.RemoveFileRequest(path=path), metadata=METADATA),
                ):
                    await fails(attempt, grpc.StatusCode.PERMISSION_DENIED, "AGENT_PRIVATE")
            listing = client.stub.ListDirectory(pb.ListDirectoryRequest(path=str(link)), metadata=METADATA)
            await fails(listing, grpc.StatusCode.PERMISSION_DENIED, "AGENT_PRIVATE")
            agent = process.agent_pid()
            for name in ("environ", "mem", "stack"):
                await fails(client.read(f"/proc/{agent}/{name}"), grpc.StatusCode.PERMISSION_DENIED)
            for path in (
                f"/proc/{agent}/root/etc/passwd",
                f"/proc/{agent}/cwd/etc/passwd",
                "/proc/self/fd/0",
            ):
                await fails(client.read(path), grpc.StatusCode.PERMISSION_DENIED)
            assert b"MemTotal" in await client.read("/proc/meminfo")


# Trees


def entry(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar_of(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """An archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


async def test_a_tree_survives_the_way_out_and_in(agent: AgentProcess, root: Path) -> None:
    source = root / "from"
    (source / "sub/empty").mkdir(parents=True)
    (source / "sub/żółć 🚀").write_bytes(b"unicode")
    (source / ("long" * 50)).write_bytes(b"long name")
    (source / "big").write_bytes(random.Random(5).randbytes(5 * MIB + 3))
    (source / "exec").write_bytes(b"#!")
    (source / "exec").chmod(0o755)
    os.utime(source / "exec", (1_000_000_000, 1_000_000_000.5))
    os.symlink("/usr/bin/python3", source / "sub/link")
    os.symlink("nowhere", source / "dangling")
    os.mkfifo(source / "fifo")
    async with agent.client() as client:
        before = agent.agent_rss()
        archive = await client.read_tree("/from")
        with tarfile.open(fileobj=io.BytesIO(archive)) as seen:
            assert "./" not in "".join(seen.getnames())
            assert set(seen.getnames()) == {str(one.relative_to(source)) for one in source.rglob("*")}
        answer = await client.write_tree("/to/here", archive)
        assert answer.entries == len(list(source.rglob("*")))
        assert agent.agent_rss() - before < 24 * MIB
    target = root / "to/here"
    for one in source.rglob("*"):
        other = target / one.relative_to(source)
        assert other.lstat().st_mode == one.lstat().st_mode
        if one.is_symlink():
            assert os.readlink(other) == os.readlink(one)
        elif one.is_file():
            assert hashlib.sha256(other.read_bytes()).digest() == hashlib.sha256(one.read_bytes()).digest()
            assert int(other.stat().st_mtime) == int(one.stat().st_mtime)


async def test_a_single_file_is_a_tree_too_and_limits_hold(agent: AgentProcess, root: Path) -> None:
    (root / "file").write_bytes(b"x" * 100_000)
    async with agent.client() as client:
        with tarfile.open(fileobj=io.BytesIO(await client.read_tree("/file"))) as archive:
            assert archive.getnames() == ["file"]
        await fails(
            client.read_tree("/file", 50_000), grpc.StatusCode.RESOURCE_EXHAUSTED, "ARCHIVE_TOO_LARGE"
        )
        await fails(client.read_tree("/no"), grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        ([entry("../x", b"1")], grpc.StatusCode.PERMISSION_DENIED),
        ([entry("a/../../x", b"1")], grpc.StatusCode.PERMISSION_DENIED),
        ([entry("/etc/x", b"1")], grpc.StatusCode.PERMISSION_DENIED),
        ([entry("l", type=tarfile.SYMTYPE, linkname="/"), entry("l/x", b"1")], grpc.StatusCode.PERMISSION_DENIED),  # noqa: E501
        ([entry("l", type=tarfile.SYMTYPE, linkname=".."), entry("l/x", b"1")], grpc.StatusCode.PERMISSION_DENIED),  # noqa: E501
        ([entry("h", type=tarfile.LNKTYPE, linkname="../../secret")], grpc.StatusCode.PERMISSION_DENIED),
        ([entry("h", type=tarfile.LNKTYPE, linkname="/etc/passwd")], grpc.StatusCode.PERMISSION_DENIED),
        ([entry("dev", type=tarfile.CHRTYPE, devmajor=1, devminor=3)], grpc.StatusCode.PERMISSION_DENIED),
        ([entry("dev", type=tarfile.BLKTYPE, devmajor=8, devminor=0)], grpc.StatusCode.PERMISSION_DENIED),
    ],
)  # fmt: skip
async def test_hostile_archives_are_refused(
    agent: AgentProcess, root: Path, entries: list[tuple[tarfile.TarInfo, bytes]], code: grpc.StatusCode
) -> None:
    async with agent.client() as client:
        await fails(client.write_tree("/in", tar_of(entry("ok", b"fine"), *entries)), code)
        assert (root / "in/ok").read_bytes() == b"fine"
        assert not (root / "x").exists()


async def test_a_link_in_the_archive_is_replaced_not_followed(agent: AgentProcess, root: Path) -> None:
    (root / "target").write_bytes(b"untouched")
    async with agent.client() as client:
        await client.write_tree(
            "/in",
            tar_of(
                entry("f", type=tarfile.SYMTYPE, linkname="../target"),
                entry("f", b"new", mode=0o4755),
                entry("g", type=tarfile.LNKTYPE, linkname="f"),
            ),
        )
    assert (root / "target").read_bytes() == b"untouched"
    assert (root / "in/g").read_bytes() == b"new"
    assert (root / "in/f").lstat().st_mode & 0o7777 == 0o755  # no set-id bits


@pytest.mark.parametrize("damage", ["truncated", "garbage", "bad-size", "empty"])
async def test_malformed_archives_fail_and_the_agent_lives(
    agent: AgentProcess, root: Path, damage: str
) -> None:
    good = tar_of(entry("f", b"x" * 100_000))
    archive = {
        "truncated": good[:60_000],
        "garbage": random.Random(6).randbytes(50_000),
        "bad-size": good[:124] + b"\xff" * 12 + good[136:],
        "empty": b"",
    }[damage]
    async with agent.client() as client:
        if damage == "empty":
            await fails(client.write_tree("/in", archive), grpc.StatusCode.INVALID_ARGUMENT)
        else:
            await fails(client.write_tree("/in", archive), grpc.StatusCode.INVALID_ARGUMENT, "BAD_ARCHIVE")
        await client.sh("true")


async def test_random_damage_never_escapes_nor_kills(agent: AgentProcess, root: Path) -> None:
    chance = random.Random(7)
    good = bytearray(
        tar_of(entry("a/b", b"x" * 2000), entry("l", type=tarfile.SYMTYPE, linkname="a"), entry("c", b"y"))
    )
    async with agent.client() as client:
        for _ in range(60):
            broken = bytearray(good)
            for _ in range(chance.randrange(1, 4)):
                broken[chance.randrange(2048)] = chance.randrange(256)
            code, text = await outcome(client.write_tree("/in", bytes(broken)))
            assert code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), text
        await client.sh("true")


def host(*argv: str) -> None:
    """Run a program of the host."""
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


async def test_a_full_disk_names_the_path(agent: AgentProcess, root: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this host")
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    (root / "small").mkdir()
    await asyncio.to_thread(host, "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(root / "small"))
    try:
        async with agent.client() as client:
            error = await fails(
                client.write("/small/f", bytes(MIB)), grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL"
            )
            assert reason(error).metadata["path"] == "/small/f"
            assert list((root / "small").iterdir()) == []
            archive = tar_of(entry("sub/f", bytes(MIB)))
            error = await fails(
                client.write_tree("/small", archive), grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL"
            )
            assert "/small/sub/f" in str(error.details())
            # A recursive removal does not reach into what is mounted there.
            (root / "small/keep").write_bytes(b"")
            request = pb.RemoveFileRequest(path="/small", recursive=True)
            await fails(
                client.stub.RemoveFile(request, metadata=METADATA), grpc.StatusCode.FAILED_PRECONDITION
            )
            assert (root / "small/keep").exists()
    finally:
        await asyncio.to_thread(host, "umount", str(root / "small"))
