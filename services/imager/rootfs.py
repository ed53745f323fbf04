"""The guest's file system without its Python: directories, accounts, busybox."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from services.common.errors import Corrupt
from services.common.process import run
from services.imager import cpio

SANDBOX = 1000
BUSYBOX = "bin/busybox"
# `init` and `linuxrc` would start busybox's own init; /init is ours.
_APPLETS_OUT = frozenset({"linuxrc", "sbin/init", "bin/busybox"})

_PASSWD = f"""\
root:x:0:0:root:/root:/bin/sh
sandbox:x:{SANDBOX}:{SANDBOX}:sandbox:/home/sandbox:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUP = f"root:x:0:\ntty:x:5:\nsandbox:x:{SANDBOX}:\nnogroup:x:65534:\n"
_HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
_NSSWITCH = "passwd: files\ngroup: files\nhosts: files dns\n"


def base_entries(debian_version: str) -> Iterator[cpio.Entry]:
    """Directories, device nodes and `/etc`."""
    for name in (
        "bin",
        "sbin",
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "lib",
        "etc",
        "var/lib",
        "var/log",
        "home",
        "mnt",
        "opt",
    ):
        yield cpio.directory(name)
    for name in ("proc", "sys", "dev", "run"):
        yield cpio.directory(name)
    yield cpio.directory("root", 0o700)
    yield cpio.directory("tmp", 0o1777)
    yield cpio.directory("var/tmp", 0o1777)
    for name in ("workspace", "home/sandbox"):
        yield cpio.directory(name, 0o755, uid=SANDBOX, gid=SANDBOX)
    # The kernel opens /dev/console for init before anything can mount devtmpfs.
    yield cpio.character_device("dev/console", 5, 1, 0o600)
    yield cpio.character_device("dev/null", 1, 3, 0o666)
    release = (
        f'PRETTY_NAME="voidbox guest (Debian {debian_version})"\nNAME="voidbox guest"\n'
        f'ID=voidbox\nID_LIKE=debian\nVERSION_ID="{debian_version}"\n'
    )
    for name, text in {
        "passwd": _PASSWD,
        "group": _GROUP,
        "hosts": _HOSTS,
        "nsswitch.conf": _NSSWITCH,
        "os-release": release,
        "hostname": "voidbox\n",
    }.items():
        yield cpio.file(f"etc/{name}", text.encode())
    yield cpio.file("etc/shadow", b"root:*:::::::\nsandbox:*:::::::\nnobody:*:::::::\n", 0o600)


async def busybox_entries(tree: Path) -> list[cpio.Entry]:
    """Busybox and a link for each of its applets.

    Args:
        tree: The unpacked `busybox-static`; its program runs here to say what it has.
    """
    program = next((path for path in (tree / BUSYBOX, tree / f"usr/{BUSYBOX}") if path.is_file()), None)
    if program is None:
        raise Corrupt(
            "the package busybox-static holds no bin/busybox", reason="BAD_PACKAGE", package="busybox-static"
        )
    listed = await run([program, "--list-full"])
    applets = sorted(set(listed.decode().split()) - _APPLETS_OUT)
    return [
        cpio.file(BUSYBOX, program, 0o755),
        *(cpio.symlink(applet, f"/{BUSYBOX}") for applet in applets),
    ]
