"""Shared directories under load: what a box does to one is what the host finds there, and nothing else.

A box of its own makes random changes to a file and compares each with a copy in its memory
(as fsx does), holds twenty mounts, shares one with another box, and tries to leave them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.imager_images import need, run
from tests.vm import Client, host_directory, refused
from voidbox.common.v1 import common_pb2

pytestmark = pytest.mark.vm

OWNER = 4242 if os.geteuid() == 0 else os.geteuid()
RW, RO = common_pb2.MOUNT_MODE_READ_WRITE, common_pb2.MOUNT_MODE_READ_ONLY
OVERLAY = common_pb2.MOUNT_MODE_OVERLAY
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
    what = r.choice(("write", "write", "read", "truncate", "append", "map", "reopen", "rename", "sync",
                     "link", "allocate", "vector"))
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
        r.choice((os.fsync, os.fdatasync, lambda _: os.sync()))(fd)
    elif what == "link":  # the same file under another name, which then takes the first one's place
        os.link(path, path + ".link")
        os.replace(path + ".link", path)  # of one file: does nothing (rename(2))
        assert os.stat(path).st_nlink == 2
        os.unlink(path)
        os.rename(path + ".link", path)
        os.close(fd)  # 9p knows open files by name when they are mapped or cut
        fd = os.open(path, os.O_RDWR)
    elif what == "allocate":  # a hole, then what writes into it
        os.ftruncate(fd, max(len(model), at))
        model.extend(bytes(max(0, at - len(model))))
    elif what == "vector" and model:
        at = r.randrange(len(model))
        pieces = [r.randbytes(n) for n in (1, 4095, 4097, 3)]
        os.pwritev(fd, pieces, at)
        data = b"".join(pieces)
        model.extend(bytes(max(0, at + len(data) - len(model))))
        model[at:at + len(data)] = data
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
# What programs rely on beside content: links, locks between processes, attributes, renames over others.
SEMANTICS = """
import errno, fcntl, os, stat, subprocess, sys
os.chdir(sys.argv[1])
def fails(number, call, *args, **how):
    try:
        call(*args, **how)
    except OSError as error:
        assert error.errno == number, (error, number)
    else:
        raise AssertionError(f"{call} {args} succeeded")
open("a", "w").write("A")
open("b", "w").write("B")
os.link("a", "hard")
assert os.stat("a").st_ino == os.stat("hard").st_ino and os.stat("a").st_nlink == 2
os.symlink("a", "soft")
assert os.readlink("soft") == "a" and open("soft").read() == "A" and stat.S_ISLNK(os.lstat("soft").st_mode)
os.rename("b", "a")
assert open("a").read() == "B" and open("hard").read() == "A" and os.stat("hard").st_nlink == 1
os.makedirs("d/e")
fails(errno.ENOTEMPTY, os.rmdir, "d")
fails(errno.ENOTEMPTY, os.rename, "x", "d") if os.path.isdir("x") else None
os.rename("d", "f")
assert os.listdir("f") == ["e"]
fails(errno.EEXIST, os.mkdir, "f")
fails(errno.EEXIST, os.open, "a", os.O_CREAT | os.O_EXCL)
fails(errno.ENOENT, os.open, "none", os.O_RDONLY)
fails(errno.ELOOP, os.open, "soft", os.O_RDONLY | os.O_NOFOLLOW)
os.chmod("a", 0o640)
assert stat.S_IMODE(os.stat("a").st_mode) == 0o640
os.utime("a", (10**9, 10**9 + 5))  # 9p takes whole seconds
assert os.stat("a").st_mtime == 10**9 + 5
os.setxattr("a", "user.note", b"text")
assert os.getxattr("a", "user.note") == b"text" and "user.note" in os.listxattr("a")
os.removexattr("a", "user.note")
assert os.listxattr("a") == []
# A lock holds between the processes of the box.
with open("a") as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    other = "import fcntl, sys; fcntl.flock(open('a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", other], capture_output=True)
    assert b"BlockingIOError" in done.stderr, done
subprocess.run([sys.executable, "-c", other], check=True)
# An open file lives on when its name is gone, and appends go to the end.
fd = os.open("a", os.O_RDWR | os.O_APPEND)
os.unlink("a")
os.write(fd, b"tail")
assert os.pread(fd, 9, 0) == b"Btail"
os.close(fd)
names = ["with space", "new\\nline", "\\udcff", "n" * 255, "-rf", "ümlaut"]
for name in names:
    open(name, "w").close()
assert set(names) <= set(os.listdir("."))
fails(errno.ENAMETOOLONG, open, "n" * 256, "w")
for name in names:
    os.unlink(name)
"""
# In the box: clone, build with make and Python, test, commit.
BUILD = """
set -e
export PATH=/opt/tools/bin:$PATH LD_LIBRARY_PATH=/opt/tools/lib HOME=/tmp
export GIT_EXEC_PATH=/opt/tools/lib/git-core GIT_TEMPLATE_DIR=/opt/tools/templates
export GIT_AUTHOR_NAME=b GIT_AUTHOR_EMAIL=b@x GIT_COMMITTER_NAME=b GIT_COMMITTER_EMAIL=b@x
git config --global --add safe.directory '*'
cd /work
git clone -q /origin project
cd project
make -s
test "$(python3 build/app.pyz)" = "sum 5050"
git status --porcelain | sed 's/^/status: /'
echo 'def product(a, b): return a * b' >> app/numbers_.py
make -s
git commit -qam 'Add a product'
git fsck --strict
git gc -q
git log --oneline | wc -l
"""
MAKEFILE = """
SOURCES := $(wildcard app/*.py)
build/app.pyz: $(SOURCES) build/tested
\tpython3 -m zipapp app -o $@
build/tested: $(SOURCES)
\t@mkdir -p build
\tpython3 -m compileall -q app
\tpython3 -m unittest -q app.test_numbers 2>build/test.log
\t@touch $@
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


async def test_single_files_are_mounted_by_themselves(client: Client) -> None:
    with host_directory(OWNER) as directory:
        for name in ("config", "notes", "other"):
            (directory / name).write_text(f"{name}\n")
            if os.geteuid() == 0:
                os.chown(directory / name, OWNER, OWNER)
        mounts = [
            share(directory / "config", "/etc/app/config", RO),
            share(directory / "notes", "/home/notes.txt", RW),
        ]
        error = await refused(client.create("files", mounts=[share(directory / "notes", "/a", OVERLAY)]))
        assert "only a directory can be an overlay" in error.message
        await client.create("files", mounts=mounts)
        try:
            script = "cat /etc/app/config && echo more >> /home/notes.txt && ls -A /etc/app"
            script += " && stat -c %u /home/notes.txt"
            exit_, out, error_ = await client.run("files", "sh", "-c", script)
            assert (exit_.exit_code, out.decode()) == (0, f"config\nconfig\n{OWNER}\n"), error_.decode()
            assert (directory / "notes").read_text() == "notes\nmore\n"
            for change in (
                "echo x > /etc/app/config",
                "rm -f /etc/app/config",
                "mv /etc/app/config /etc/app/x",
            ):
                exit_, _, _ = await client.run("files", "sh", "-c", change, user="0")
                assert exit_.exit_code != 0, change
            exit_, out, _ = await client.run(
                "files", "sh", "-c", "find / -name other -not -path '/proc/*' 2>/dev/null"
            )
            assert out == b"", "nothing beside the file is shared"
            (directory / "config").write_text("edited on the host\n")
            _, out, _ = await client.run("files", "cat", "/etc/app/config")
            assert out == b"edited on the host\n"
        finally:
            await client.delete("files")
        error = await refused(client.create("files", mounts=[share(directory / "config", "/tmp", RO)]))
        assert "/tmp is a directory, but a file is to be mounted there" in error.message


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with this host's git and make, and the libraries that they need."""
    base = tmp_path_factory.mktemp("tools")
    (base / "tree/bin").mkdir(parents=True)
    (base / "tree/lib/git-core").mkdir(parents=True)
    (base / "tree/templates").mkdir()
    for name in ("git", "make"):
        program = need(name, name)
        shutil.copy(program, base / "tree/bin")
        for word in run("ldd", program).split():
            # The C library is the guest's own: both are Debian's.
            if word.startswith("/") and "libc.so" not in word and "ld-linux" not in word:
                shutil.copy(word, base / "tree/lib")
    for name in ("git", "git-upload-pack", "git-gc"):
        (base / "tree/lib/git-core" / name).symlink_to("../../bin/git")
    run("mke2fs", "-q", "-t", "ext4", "-d", base / "tree", base / "tools.ext4", "48M")
    return base / "tools.ext4"


def origin(path: Path) -> None:
    """A repository with a small project: a package, its test, a Makefile."""
    files = {
        "Makefile": MAKEFILE,
        ".gitignore": "build/\n__pycache__/\n",
        "app/__init__.py": "",
        "app/__main__.py": "import numbers_; print('sum', numbers_.total(range(101)))\n",
        "app/numbers_.py": "def total(values):\n    return sum(values)\n",
        "app/test_numbers.py": "import unittest\nfrom app.numbers_ import total\n\n"
        "class T(unittest.TestCase):\n    def test(self):\n        assert total([1, 2]) == 3\n",
    }
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    git: list[str | Path] = ["git", "-C", path, "-c", "user.name=a", "-c", "user.email=a@x"]
    run("git", "init", "-q", path)
    run(*git, "add", ".")
    run(*git, "commit", "-qm", "Start")


async def test_git_and_make_work_in_a_mount(client: Client, tools: Path) -> None:
    with host_directory(OWNER) as directory:
        for name in ("origin", "work", "plain"):
            (directory / name).mkdir()
        origin(directory / "origin")
        if os.geteuid() == 0:
            for each in (directory, *directory.rglob("*")):
                os.chown(each, OWNER, OWNER, follow_symlinks=False)
        mounts = [
            share(directory / "origin", "/origin", RO),
            share(directory / "work", "/work", RW),
            share(directory / "plain", "/plain", RW),
        ]
        disks = [{"base_path": str(tools), "guest_path": "/opt/tools"}]
        await client.create("build", mounts=mounts, disks=disks)
        try:
            exit_, _, error = await client.run("build", "python3", "-c", SEMANTICS, "/plain")
            assert exit_.exit_code == 0, error.decode()
            exit_, out, error = await client.run("build", "sh", "-c", BUILD)
            assert (exit_.exit_code, out) == (0, b"2\n"), error.decode()
        finally:
            await client.delete("build")
        project = directory / "work/project"
        assert {path.lstat().st_uid for path in project.rglob("*")} == {OWNER}
        git: list[str | Path] = ["git", "-c", f"safe.directory={project}", "-C", project]
        assert run(*git, "log", "--format=%s").split("\n")[:2] == ["Add a product", "Start"]
        assert run(*git, "status", "--porcelain") == ""
        assert sorted(os.listdir(directory / "plain")) == ["f", "hard", "soft"]


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
