"""Shared directories under load: what a box does to one is what the host finds there, and nothing else.

A box of its own makes random changes to a file and compares each with a copy in its memory
(as fsx does), holds twenty mounts, shares one with another box, and tries to leave them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm import Client, host_directory
from voidbox.common.v1 import common_pb2

pytestmark = pytest.mark.vm

OWNER = 4242 if os.geteuid() == 0 else os.geteuid()
RW, RO = common_pb2.MOUNT_MODE_READ_WRITE, common_pb2.MOUNT_MODE_READ_ONLY
MOUNTS = 20
SEED = 20240611
# As fsx: each operation on the file is done to `model` too, and both must agree at once.
RANDOM_CHANGES = """
import mmap, os, random, hashlib, sys
path, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
r = random.Random(seed)
fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
model, limit = bytearray(), 256 << 10
def check(at, size, what):
    got = os.pread(fd, size, at)
    assert got == bytes(model[at:at + size]), (seed, number, what, at, size, len(got))
for number in range(count):
    what = r.choice(("write", "write", "read", "truncate", "append", "map", "reopen", "rename", "sync"))
    at, size = r.randrange(limit), r.randrange(1, 20000)
    if what == "write":
        data = r.randbytes(size)
        os.pwrite(fd, data, at)
        model.extend(bytes(max(0, at - len(model))))
        model[at:at + size] = data
    elif what == "append":
        data = r.randbytes(size % 3000 + 1)
        os.pwrite(fd, data, len(model))
        model += data
    elif what == "truncate":
        os.ftruncate(fd, at)
        model = model[:at] + bytes(max(0, at - len(model)))
    elif what == "map" and model:
        at = r.randrange(len(model))
        with mmap.mmap(fd, len(model)) as m:
            size = min(size, len(model) - at)
            assert m[at:at + size] == bytes(model[at:at + size]), (seed, number, what)
            m[at:at + size] = data = r.randbytes(size)
            m.flush()
        model[at:at + size] = data
    elif what == "reopen":
        os.close(fd)
        fd = os.open(path, os.O_RDWR)
    elif what == "rename":
        os.rename(path, path + ".new")
        os.rename(path + ".new", path)
    elif what == "sync":
        os.fsync(fd)
    assert os.fstat(fd).st_size == len(model), (seed, number, what, os.fstat(fd).st_size, len(model))
    check(at, size, what)
check(0, len(model) + 1, "end")
os.close(fd)
print(hashlib.sha256(model).hexdigest())
"""
# Every way to change something, each of which must be refused.
CHANGES = """
import errno, os, socket
os.chdir("/mnt/ro")
def tried(name, change):
    try:
        change()
        print("done:", name)
    except OSError as error:
        if error.errno != errno.EROFS:
            print("other:", name, error)
tried("create", lambda: open("new", "w"))
tried("write", lambda: open("file", "r+"))
tried("truncate", lambda: os.truncate("file", 0))
tried("unlink", lambda: os.unlink("file"))
tried("rename", lambda: os.rename("file", "x"))
tried("link", lambda: os.link("file", "x"))
tried("symlink", lambda: os.symlink("file", "x"))
tried("mkdir", lambda: os.mkdir("d"))
tried("rmdir", lambda: os.rmdir("directory"))
tried("chmod", lambda: os.chmod("file", 0o600))
tried("chown", lambda: os.chown("file", os.getuid(), os.getgid()))
tried("utime", lambda: os.utime("file"))
tried("setxattr", lambda: os.setxattr("file", "user.x", b"x"))
tried("mkfifo", lambda: os.mkfifo("f"))
tried("socket", lambda: socket.socket(socket.AF_UNIX).bind("s"))
"""
ESCAPES = """
import os
for path in ("/mnt/rw/../../secret", "/mnt/rw/up", "/mnt/rw/absolute", "/mnt/rw/d/../../secret"):
    try:
        print(path, open(path).read())
    except OSError:
        pass
fd = os.open("/mnt/rw", os.O_RDONLY)
for step in range(1, 6):
    try:
        print(step, open(os.open("../" * step + "secret", os.O_RDONLY, dir_fd=fd)).read())
    except OSError:
        pass
"""


def share(path: Path, guest: str, mode: common_pb2.MountMode.ValueType) -> common_pb2.Mount:
    return common_pb2.Mount(host_path=str(path), guest_path=guest, mode=mode)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with two to share and a secret beside them."""
    with host_directory(OWNER) as path:
        for name in ("rw", "ro"):
            (path / name).mkdir()
        (path / "ro/file").write_text("text")
        (path / "ro/directory").mkdir()
        (path / "secret").write_text("SECRET")
        (path / "rw/up").symlink_to("../secret")
        (path / "rw/absolute").symlink_to(path / "secret")
        (path / "rw/d").mkdir()
        for each in path.rglob("*"):
            if os.geteuid() == 0:
                os.chown(each, OWNER, OWNER, follow_symlinks=False)
        yield path


async def test_shares_hold_under_random_changes_refuse_writes_and_keep_what_is_beside_them(
    client: Client, directory: Path
) -> None:
    mounts = [share(directory / "rw", "/mnt/rw", RW), share(directory / "ro", "/mnt/ro", RO)]
    await client.create("random", mounts=mounts)
    try:
        args = ("-c", RANDOM_CHANGES, "/mnt/rw/file", str(SEED), "300")
        exit_, out, error = await client.run("random", "python3", *args)
        assert exit_.exit_code == 0, error.decode()
        found = hashlib.sha256((directory / "rw/file").read_bytes()).hexdigest()
        assert out.decode().strip() == found, "the host has what the box has written"

        _, out, error = await client.run("random", "python3", "-c", CHANGES)
        assert (out, error) == (b"", b""), "each change of a read-only share is EROFS"
        _, out, _ = await client.run("random", "python3", "-c", CHANGES, user="0")
        assert out == b"", "also for uid 0"
        assert sorted(path.name for path in (directory / "ro").iterdir()) == ["directory", "file"]
        assert (directory / "ro/file").read_text() == "text"

        for user in ("", "0"):
            _, out, _ = await client.run("random", "python3", "-c", ESCAPES, user=user)
            assert b"SECRET" not in out
    finally:
        await client.delete("random")


async def test_a_box_has_twenty_mounts_and_two_boxes_share_one(client: Client) -> None:
    with contextlib.ExitStack() as stack:
        directories = [stack.enter_context(host_directory(OWNER)) for _ in range(MOUNTS)]
        mounts = [share(path, f"/mnt/m{number}", RW) for number, path in enumerate(directories)]
        await client.create("many", mounts=mounts)
        await client.create("other", mounts=[share(directories[7], "/shared", RW)])
        try:
            script = "for n in $(seq 0 19); do echo $n > /mnt/m$n/name || exit 1; done"
            exit_, _, error = await client.run("many", "sh", "-c", script)
            assert exit_.exit_code == 0, error.decode()
            assert [(path / "name").read_text() for path in directories] == [f"{n}\n" for n in range(MOUNTS)]
            _, out, _ = await client.run("other", "sh", "-c", "cat /shared/name; echo back > /shared/reply")
            assert out == b"7\n"
            _, out, _ = await client.run("many", "cat", "/mnt/m7/reply")
            assert out == b"back\n"
        finally:
            await client.delete("many")
            await client.delete("other")
