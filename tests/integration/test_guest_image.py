"""Real guest images: built twice, killed, raced, by another user, and booted under emulation.

What must be downloaded comes from the machine's cache (or the network, the first time);
builds happen in caches of their own, so no test touches the image that others use.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.common.errors import NotFound
from services.common.paths import Paths
from services.common.process import run
from services.imager import cpio
from services.imager.debian import Debian
from services.imager.guest_image import build_guest_image
from services.imager.guest_kernel import LAZY_MODULES
from services.imager.guest_project import project_root
from services.imager.guest_store import GuestImage, load_guest_image, verify_guest_image
from services.imager.terminal import network_env
from tests.other_user import needs_another_user

_BUILD_SECONDS = 240
_BOOT_SECONDS = 120
# What the tests boot instead of the agent: prints what it finds as JSON and powers off.
_INIT = """\
#!/usr/bin/python3.11 -IS
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mount(b"proc", b"/proc", b"proc", 0, None)
libc.mount(b"dev", b"/dev", b"devtmpfs", 0, None)
def load(name):
    failed = []
    for path in open(f"/lib/modules/voidbox/{name}").read().split():
        fd = os.open(path, os.O_RDONLY)
        if libc.syscall(313, fd, b"", 0) and ctypes.get_errno() != 17:
            failed.append([path, os.strerror(ctypes.get_errno())])
        os.close(fd)
    return failed
found = {"boot": load("boot"), "release": os.uname().release}
import socket
listener = socket.socket(socket.AF_VSOCK)
listener.bind((0xffffffff, 1024))
found["lazy"] = {name: load(f"lazy/{name}") for name in sorted(os.listdir("/lib/modules/voidbox/lazy"))}
found["filesystems"] = open("/proc/filesystems").read().split()
sys.path.insert(0, "/usr/lib/voidbox/site")
import grpc.aio, grpc_health.v1.health_pb2, grpc_reflection.v1alpha.reflection, grpc_channelz.v1.channelz
from google.rpc import error_details_pb2, status_pb2
from voidbox.guest.v1 import guest_pb2, guest_pb2_grpc
cached = [getattr(module, "__cached__", None) for module in list(sys.modules.values())]
found["bytecode"] = sorted({os.path.splitext(path)[1] for path in cached if path})
import bz2, csv, ctypes, decimal, email, hashlib, http.client, lzma, multiprocessing, re
import statistics, subprocess, tarfile, unittest, uuid, xml.etree.ElementTree, zipfile
found["sha256"] = hashlib.sha256(b"").hexdigest()
found["uptime"] = float(open("/proc/uptime").read().split()[0])
read, write = os.pipe()
if os.fork() == 0:
    os.setgid(1000)
    os.setuid(1000)
    try:
        seen = os.listdir("/usr/lib/voidbox/site") and "readable"
    except PermissionError:
        seen = "denied"
    def output(*argv):
        return subprocess.run(argv, capture_output=True).stdout.decode()
    python = output("/usr/bin/python3", "-c", "import json, asyncio; print(json.dumps(1))")
    shell = output("/bin/sh", "-c", "ls /workspace | wc -l && touch /workspace/a && id -un")
    os.write(write, json.dumps([seen, python, shell]).encode())
    os._exit(0)
os.wait()
found["sandbox"] = json.loads(os.read(read, 4096))
print("FOUND" + json.dumps(found), flush=True)
libc.reboot(0x4321fedc)
"""


@pytest.fixture(scope="session")
def shared_cache() -> Path:
    """The machine's cache with everything downloaded; its default image stays what it is."""
    cache = Paths.from_env(os.environ).cache
    asyncio.run(build_guest_image(cache, env=network_env(os.environ), make_default=False))
    return cache


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the project's part of the image, which nobody edits meanwhile."""
    copy = tmp_path / "source"
    for part in ("guest", "voidbox/common", "voidbox/guest"):
        shutil.copytree(project_root() / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture
def fresh_cache(shared_cache: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes caches that have the downloads, perhaps the unpacked kernel, and nothing else made of them."""

    def make(name: str, *, kernel: bool = True) -> Path:
        cache = tmp_path / name
        for part in ("debian/pool", "debian/resolved", "wheels", *(("kernel",) if kernel else ())):
            shutil.copytree(shared_cache / part, cache / part, copy_function=_link)
        return cache

    return make


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# An index, mirror or proxy that does not exist: a build that needs the network fails.
_NOWHERE = ("http_proxy", "https_proxy", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
_OFFLINE = dict.fromkeys(_NOWHERE, "http://127.0.0.1:1") | {
    "PIP_NO_INDEX": "1",
    "PIP_CONFIG_FILE": "/dev/null",
}


def command(cache: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "services.imager.guest_image", "--cache", str(cache), *flags]


async def test_two_builds_without_network_give_the_same_digest(
    shared_cache: Path, fresh_cache: Callable[..., Path], source: Path
) -> None:
    first = await build_guest_image(fresh_cache("one", kernel=False), env=_OFFLINE, source=source)
    second = await build_guest_image(fresh_cache("two"), env=_OFFLINE, source=source)
    assert first.digest == second.digest
    assert first.initramfs.read_bytes() == second.initramfs.read_bytes()
    verify_guest_image(second)
    shared = await build_guest_image(shared_cache, source=source, make_default=False)
    assert shared.digest == first.digest


async def test_a_build_with_the_same_inputs_is_skipped_and_a_changed_source_is_not(
    shared_cache: Path, source: Path
) -> None:
    before = await build_guest_image(shared_cache, source=source, make_default=False)
    started = time.monotonic()
    assert await build_guest_image(shared_cache, source=source, make_default=False) == before
    assert time.monotonic() - started < 3  # 0.2 s on an idle machine
    (source / "guest/new.py").write_text("VALUE = 1\n")
    changed = await build_guest_image(shared_cache, source=source, make_default=False)
    names = {entry.name for entry in cpio.read_archive(changed.initramfs.read_bytes())}
    assert changed.digest != before.digest
    assert {
        f"usr/lib/voidbox/site/guest/{name}" for name in ("new.py", "__pycache__/new.cpython-311.pyc")
    } <= names
    shutil.rmtree(changed.directory)


async def test_the_archive_is_what_another_reader_sees(shared_cache: Path, tmp_path: Path) -> None:
    image = await build_guest_image(shared_cache, make_default=False)
    entries = list(cpio.read_archive(image.initramfs.read_bytes()))
    busybox = next(entry for entry in entries if entry.name == "bin/busybox")
    assert isinstance(busybox.content, bytes)
    program = tmp_path / "busybox"
    program.write_bytes(busybox.content)
    program.chmod(0o755)
    listed = await asyncio.to_thread(_list_archive, program, image.initramfs)
    assert listed == [entry.name for entry in entries]


def _list_archive(program: Path, archive: Path) -> list[str]:
    with archive.open("rb") as source:
        done = subprocess.run([program, "cpio", "-t"], stdin=source, capture_output=True, check=True)
    return done.stdout.decode().splitlines()


async def test_a_build_killed_at_any_point_leaves_nothing_that_is_trusted(
    fresh_cache: Callable[..., Path], source: Path
) -> None:
    cache = fresh_cache("killed", kernel=False)
    for marker in ("unpack", "compile", "write"):
        child = await asyncio.create_subprocess_exec(
            *command(cache, "--source", str(source)),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            cwd=project_root(),
        )
        assert child.stderr is not None
        async for line in child.stderr:
            if line.decode().startswith(marker):
                break
        child.kill()
        await child.communicate()
        assert child.returncode == -signal.SIGKILL
        with pytest.raises(NotFound):
            load_guest_image(cache)
    image = await build_guest_image(cache, env=_OFFLINE, source=source)
    verify_guest_image(image)
    leavings = [path for path in cache.rglob("*") if path.name.startswith(("build-", "unpack-", "download-"))]
    assert not leavings


async def test_two_builders_at_once_agree(fresh_cache: Callable[..., Path], source: Path) -> None:
    cache = fresh_cache("raced")
    argv = command(cache, "--source", str(source))
    printed = await asyncio.gather(*(run(argv, cwd=project_root(), seconds=_BUILD_SECONDS) for _ in range(2)))
    assert printed[0] == printed[1]
    assert printed[0].decode().splitlines()[0] == load_guest_image(cache).digest


@needs_another_user
async def test_another_user_without_rights_builds_the_same_image(shared_cache: Path, source: Path) -> None:
    # Not under the test's own directory, which only its owner may enter.
    home = Path("/var/tmp") / f"voidbox-test-{os.getpid()}"
    try:
        home.mkdir()
        cache = home / "cache"
        for part in ("debian/pool", "debian/resolved", "wheels", "kernel"):
            shutil.copytree(shared_cache / part, cache / part)
        shutil.copytree(source, home / "source")
        for path in [home, *home.rglob("*")]:
            os.chown(path, 65534, 65534)
        drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
        environment = {"HOME": str(home), "TMPDIR": str(home)}
        printed = await run(
            [*drop, *command(cache, "--source", str(home / "source"))],
            cwd=project_root(),
            env=environment,
            seconds=_BUILD_SECONDS,
        )
        expected = await build_guest_image(shared_cache, source=source, make_default=False)
        assert printed.decode().splitlines()[0] == expected.digest
    finally:
        shutil.rmtree(home, ignore_errors=True)


async def test_resolving_and_downloading_works_from_nothing(tmp_path: Path) -> None:
    """The only test that must reach Debian's mirrors: a private apt that starts empty."""
    apt = Debian(tmp_path, env=network_env(os.environ))
    (package,) = await apt.resolve(["libffi8"])
    await apt.fetch([package])
    tree = await apt.unpack(package)
    assert list(tree.rglob("libffi.so.8"))
    offline = Debian(tmp_path, env=_OFFLINE)
    assert await offline.resolve(["libffi8"]) == (package,)
    await offline.fetch([package])


def boot(image: GuestImage, directory: Path) -> dict[str, object]:
    """Boot `image` with `_INIT` laid over its `/init`; what that printed."""
    overlay = io.BytesIO()
    cpio.write_archive([cpio.file("init", _INIT.encode(), 0o755)], overlay)
    initramfs = directory / "initramfs.cpio"
    shutil.copyfile(image.initramfs, initramfs)
    with initramfs.open("ab") as out:
        out.write(overlay.getvalue())
    argv = [
        "qemu-system-x86_64",
        "-M",
        "q35,accel=tcg",
        "-cpu",
        "max",
        "-m",
        "256M",
        "-nodefaults",
        "-no-user-config",
    ]
    argv += ["-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(image.kernel)]
    argv += ["-initrd", str(initramfs), "-append", "console=ttyS0 quiet panic=-1 no_timer_check"]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_BOOT_SECONDS, check=True
    )
    console = done.stdout.decode(errors="replace")
    lines = [line for line in console.splitlines() if line.startswith("FOUND")]
    assert lines, console[-4000:]
    found = json.loads(lines[0].removeprefix("FOUND"))
    assert isinstance(found, dict)
    return found


def _check_boot(found: dict[str, object], image: GuestImage) -> None:
    assert found["release"] == image.release
    assert found["boot"] == []
    assert found["lazy"] == {name: [] for name in sorted(LAZY_MODULES)}
    filesystems = found["filesystems"]
    assert isinstance(filesystems, list)
    assert {"9p", "ext4", "overlay", "virtiofs", "fuse", "tmpfs", "cgroup2"} <= set(filesystems)
    assert found["bytecode"] == [".pyc"]
    assert found["sha256"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert found["sandbox"] == ["denied", "1\n", "0\nsandbox\n"]


@pytest.mark.vm
def test_debians_kernel_boots_the_image_and_loads_every_module(shared_cache: Path, tmp_path: Path) -> None:
    image = asyncio.run(build_guest_image(shared_cache, make_default=False))
    _check_boot(boot(image, tmp_path), image)


@pytest.mark.vm
def test_the_slim_kernel_boots_the_image_with_everything_built_in(shared_cache: Path, tmp_path: Path) -> None:
    try:
        image = asyncio.run(build_guest_image(shared_cache, kernel="slim", make_default=False))
    except NotFound as error:
        pytest.skip(f"optional, and not built: {error.message}")
    found = boot(image, tmp_path)
    _check_boot(found, image)
