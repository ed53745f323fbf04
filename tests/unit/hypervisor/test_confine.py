"""A program in QEMU's seat, in its exact confinement, tries to reach the host; nothing is left to it.

The shim starts it as it starts QEMU, once made by root and once by a plain user, with two shared
directories and a secret beside them that must stay out of reach. Without namespaces (hosts that
allow none) Landlock alone must keep the files; what it cannot keep is asserted as well, since
`docs/security.md` says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.hypervisor import confine, host_confinement
from tests.other_user import needs_another_user
from tests.unit.hypervisor.test_shim import ROOT, Started, gone, watched

USER = 61234
SEAT = r"""
import json, os, socket, sys
given = json.loads(sys.argv[1])

def connect(kind, address, family=socket.AF_INET):
    with socket.socket(family, kind) as s:
        s.settimeout(3)
        s.connect(address)
        s.send(b"x")

def listing(path, **how):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY, **how)
    return sorted(os.listdir(fd))

def write(path):
    with open(path, "w") as f:
        f.write("x")

ro, rw = given["ro"], given["rw"]
TRIES = {
    "read share": lambda: open(f"/dev/fd/{ro}/file").read(),
    "write share": lambda: write(f"/dev/fd/{rw}/new"),
    "write read-only share": lambda: write(f"/dev/fd/{ro}/new"),
    "remove from read-only share": lambda: os.unlink(f"/dev/fd/{ro}/file"),
    "above share": lambda: listing("..", dir_fd=rw),
    "beside share": lambda: open(f"/dev/fd/{rw}/../secret").read(),
    "beside by link": lambda: open(f"/dev/fd/{rw}/link").read(),
    "secret": lambda: open(given["secret"]).read(),
    "home": lambda: os.listdir(given["home"]),
    "root": lambda: os.listdir("/root"),
    "etc": lambda: open("/etc/passwd").read(),
    "write system": lambda: write("/usr/share/x"),
    "write root": lambda: write("/x"),
    "write tmp": lambda: write("/tmp/x"),
    "control socket": lambda: connect(socket.SOCK_STREAM, given["control"], socket.AF_UNIX),
    "control beside share": lambda: connect(socket.SOCK_STREAM, f"/dev/fd/{rw}/../control", socket.AF_UNIX),
    "abstract socket": lambda: connect(socket.SOCK_STREAM, given["abstract"], socket.AF_UNIX),
    "tcp": lambda: connect(socket.SOCK_STREAM, ("127.0.0.1", given["port"])),
    "udp": lambda: connect(socket.SOCK_DGRAM, ("127.0.0.1", given["port"])),
    "interfaces": lambda: [name for _, name in socket.if_nameindex()],
    "signal": lambda: os.kill(given["pid"], 0),
    "look at process": lambda: open(f"/proc/{given['pid']}/environ").read(),
    "processes": lambda: sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "memory": lambda: open("/dev/mem").read(1),
    "kernel log": lambda: open("/dev/kmsg").read(1),
    "host name": lambda: socket.sethostname("x"),
    "root by path": lambda: os.listdir(f"/proc/{os.getppid() or 1}/root/home"),
}
lines = [line.split() for line in open("/proc/self/status")]
done = {"status": {line[0][:-1]: line[1] for line in lines if line[0][:3] in ("Cap", "NoN")}}
for name, attack in TRIES.items():
    try:
        done[name] = attack() or "done"
    except OSError as error:
        done[name] = None
os.write(1, json.dumps(done).encode() + b"\n")
"""
OPEN = {"read share": "text", "write share": "done"}


@pytest.fixture
def host() -> Iterator[dict[str, Any]]:
    """What there is to steal: a secret beside the shares, sockets, a process of the same user."""
    with (
        tempfile.TemporaryDirectory(prefix="seat-") as name,
        socket.socket() as tcp,
        socket.socket(socket.AF_UNIX) as control,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        base = Path(name)
        for directory in ("ro", "rw"):
            (base / directory).mkdir()
        (base / "ro/file").write_text("text")
        (base / "secret").write_text("secret")
        (base / "rw/link").symlink_to("../secret")
        control.bind(f"{name}/control")
        abstract.bind(f"\0{base.name}")
        tcp.bind(("127.0.0.1", 0))
        for each in (tcp, control, abstract):
            each.listen()
        if ROOT:
            for path in (base, *base.rglob("*")):
                os.chown(path, USER, USER, follow_symlinks=False)
        fds = {each: os.open(base / each, os.O_RDONLY | os.O_DIRECTORY) for each in ("ro", "rw")}
        yield {
            **fds,
            "secret": f"{name}/secret",
            "control": f"{name}/control",
            "abstract": f"\0{base.name}",
            "home": name,
            "port": tcp.getsockname()[1],
            "pid": os.getpid(),
        }
        for fd in fds.values():
            os.close(fd)


def seat(host: dict[str, Any], *, user: int | None = None, **options: Any) -> dict[str, Any]:
    """What the program in QEMU's seat got hold of."""
    fds = (host["ro"], host["rw"])
    command = ["/usr/bin/python3", "-I", "-c", SEAT, json.dumps(host)]
    with Started(command, user=user, pass_fds=fds, writable_fds=(host["rw"],), **options) as shim:
        record = shim.end()
        log = shim.log_path.read_text()
        assert record.exit_code == 0, (record, log)
        [line] = [line for line in log.splitlines() if line.startswith('{"status"')]
        found: dict[str, Any] = json.loads(line)
        return found


def until_handled(pid: int, number: int) -> None:
    """Return once the process has a handler for the signal (its program is up)."""
    for _ in range(10_000):
        status = Path(f"/proc/{pid}/status").read_text()
        if int(status.partition("SigCgt:\t")[2].split()[0], 16) >> (number - 1) & 1:
            return
        os.sched_yield()
    raise AssertionError("the program did not start")


def check_whole(found: dict[str, Any]) -> None:
    """Everything is confined."""
    status = found.pop("status")
    assert status.pop("NoNewPrivs") == "1"
    assert {int(value, 16) for value in status.values()} == {0}, status
    assert found.pop("above share") == ["link", "new"], "`..` of a share is the share"
    assert found.pop("interfaces") == ["lo"]
    assert found.pop("processes") == [1]
    assert {name: got for name, got in found.items() if got is not None} == OPEN


@pytest.mark.skipif(not ROOT, reason="only root makes namespaces without a user namespace")
def test_a_machine_of_root_s_service_reaches_only_what_it_was_given(host: dict[str, Any]) -> None:
    check_whole(seat(host, namespaces="root", landlock=True, uid=USER, gid=USER))


@needs_another_user
def test_a_machine_of_a_plain_user_s_service_reaches_only_what_it_was_given(host: dict[str, Any]) -> None:
    check_whole(seat(host, user=USER, namespaces="user", landlock=True))


@pytest.mark.skipif(ROOT, reason="the same as for another user")
def test_our_own_machine_reaches_only_what_it_was_given(host: dict[str, Any]) -> None:
    check_whole(seat(host, namespaces="user", landlock=True))


@needs_another_user
@pytest.mark.parametrize("kind", ["root", "user"])
def test_namespaces_alone_keep_the_same(host: dict[str, Any], kind: str) -> None:
    """What Landlock repeats holds without it, but for what is inside the machine's own namespaces."""
    who: dict[str, Any] = {"user": USER} if kind == "user" else {"uid": USER, "gid": USER}
    check_whole(seat(host, namespaces=kind, landlock=False, **who))


LAYERS = r"""
import json, os, sys
over, file = map(int, sys.argv[1:3])
def tried(call):
    try:
        return call() or "done"
    except OSError as error:
        return None
def write(path):
    with open(path, "w") as f:
        f.write("box")
numbers = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
descriptors = [os.readlink(path) for path in numbers if os.path.isdir(path)]
found = {
    "read": open(f"/dev/fd/{over}/file").read(),
    "write": tried(lambda: write(f"/dev/fd/{over}/file")),
    "make": tried(lambda: write(f"/dev/fd/{over}/new")),
    "remove": tried(lambda: os.unlink(f"/dev/fd/{over}/gone")),
    "above": sorted(os.listdir(os.open("..", os.O_RDONLY, dir_fd=over))),
    "mark": tried(lambda: os.setxattr(f"/dev/fd/{over}/new", "user.overlay.opaque", b"y")),
    "whiteout": tried(lambda: os.mknod(f"/dev/fd/{over}/hidden", 0o20600, 0)),
    "single": sorted(os.listdir(f"/dev/fd/{file}")),
    "single read": open(f"/dev/fd/{file}/file").read(),
    "single write": tried(lambda: write(f"/dev/fd/{file}/file")),
    "single beside": tried(lambda: write(f"/dev/fd/{file}/new")),
    "single above": sorted(os.listdir(os.open("..", os.O_RDONLY, dir_fd=file))),
    "descriptors": descriptors,
}
os.write(1, json.dumps({"found": found}).encode() + b"\n")
"""


@needs_another_user
@pytest.mark.parametrize("kind", ["root", "user"])
def test_overlays_and_single_files_lead_to_nothing_else(host: dict[str, Any], kind: str) -> None:
    """What is written to an overlay goes beside the directory, of which the machine has nothing."""
    base = Path(host["home"])
    for name in ("upper", "work"):
        (base / name).mkdir()
        os.chown(base / name, USER, USER)
    for name in ("file", "gone"):
        (base / "rw" / name).write_text("host")
        os.chown(base / "rw" / name, USER, USER)
    who: dict[str, Any] = {"user": USER} if kind == "user" else {"uid": USER, "gid": USER}
    with contextlib.ExitStack() as stack:

        def opened(name: str) -> int:
            fd = os.open(base / name, os.O_RDONLY)
            stack.callback(os.close, fd)
            return fd

        over, upper, work, single = map(opened, ("rw", "upper", "work", "ro/file"))
        with Started(
            ["/usr/bin/python3", "-I", "-c", LAYERS, str(over), str(single)],
            pass_fds=(over, single),
            writable_fds=(over,),
            file_fds=(single,),
            overlays=((over, upper, work),),
            namespaces=kind,
            landlock=True,
            **who,
        ) as shim:
            record = shim.end()
            log = shim.log_path.read_text()
            assert record.exit_code == 0, (record, log)
            [line] = [line for line in log.splitlines() if line.startswith('{"found"')]
    found = json.loads(line)["found"]
    # Refused, or since Linux 6.7 kept under a name that means nothing to the overlay.
    found.pop("mark")
    assert "user.overlay.opaque" not in os.listxattr(base / "upper/new")
    done = {"write", "make", "remove"}
    assert {name for name, got in found.items() if got == "done"} == done
    assert (found["read"], found["single read"]) == ("host", "text")
    assert (found["whiteout"], found["single write"], found["single beside"]) == (None,) * 3
    assert found["above"] == ["file", "link", "new"], "`..` of an overlay is the overlay"
    assert found["single"] == found["single above"] == ["file"]
    assert found["descriptors"] == ["/", "/"], "neither the directory below nor the one above"
    assert sorted(os.listdir(base / "rw")) == ["file", "gone", "link"]
    assert (base / "rw/file").read_text() == "host"
    assert sorted(os.listdir(base / "upper")) == ["file", "gone", "new"]
    assert (base / "ro/file").read_text() == "text"


@needs_another_user
def test_landlock_alone_keeps_the_files_and_not_the_sockets(host: dict[str, Any]) -> None:
    found = seat(host, user=USER, landlock=True)
    kept = (
        "write read-only share", "remove from read-only share", "above share", "beside share",
        "beside by link", "secret", "home", "root", "etc", "write system", "write root", "write tmp",
        "memory", "kernel log",
        "look at process", "root by path", "host name",
    )  # fmt: skip
    assert {name: found[name] for name in kept} == dict.fromkeys(kept)
    if confine.landlock_abi() >= 4:
        assert found["tcp"] is None
    if confine.landlock_abi() >= 6:
        assert found["abstract socket"] is None
        assert found["signal"] is None
    # A socket in the file system is no file to Landlock, and UDP is not TCP: `docs/security.md`.
    assert (found["control socket"], found["udp"]) == ("done", "done")


@needs_another_user
@pytest.mark.parametrize("kind", ["root", "user"])
def test_a_confined_machine_ends_with_its_shim_and_on_request(kind: str) -> None:
    """It is the first process of its namespace, which ignores signals that it does not handle."""
    options: dict[str, Any] = {"namespaces": kind, "landlock": True}
    options |= {"user": USER} if kind == "user" else {"uid": USER, "gid": USER}
    with Started("echo $$; sleep 600", **options) as shim, watched(shim.spawned()) as machine:
        shim.process.kill()
        assert gone(machine)
    with Started("trap 'exit 7' TERM; sleep 600 & wait", **options) as shim:
        pid = shim.spawned()
        until_handled(pid, signal.SIGTERM)
        shim.process.terminate()
        record = shim.end()
        assert (record.exit_code, record.reason) == (7, "terminated")
    with Started("sleep 600", **options) as shim, watched(shim.spawned()) as machine:
        shim.process.terminate()
        record = shim.end()
        assert (record.signal, record.reason) == (signal.SIGKILL, "terminated")
        assert gone(machine)


@needs_another_user
def test_a_layer_that_the_host_denies_is_a_failure_and_not_skipped() -> None:
    with Started("true", user=USER, namespaces="root") as shim:
        record = shim.end()
        assert record.reason == "setup-failed"
        assert "namespaces" in record.detail


async def test_the_host_s_probe_tells_what_is_missing_and_why() -> None:
    found = await host_confinement.find("/usr/bin/env", USER)
    assert found.namespaces == ("root" if ROOT else "user"), found.detail
    assert found.landlock
    assert found.whole
    assert "missing" not in found.detail
    none = await host_confinement.find("/bin/false", USER)
    assert not none.namespaces
    assert not none.landlock
    assert none.detail.startswith("neither namespaces nor Landlock: ")
