"""The shim as a process; its QEMU is a small program, so that every way to end can be tried."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.hypervisor import console_ring
from services.hypervisor.shim_config import ExitRecord, ShimConfig
from tests.other_user import needs_another_user
from tests.unit.hypervisor.vsock_rig import repository

ROOT = os.getuid() == 0


class Started:
    """A shim around a shell command; a context manager that proves nothing is left."""

    def __init__(
        self, command: str | list[str], *, shim: str | None = None, user: int | None = None, **options: Any
    ) -> None:
        self._stack = contextlib.ExitStack()
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="shim-")))
        self.command = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        self.options = options
        self.shim = shim
        self.user = user
        self.exit_path = self.directory / "exit.json"
        self.log_path = self.directory / "log"
        self.console_path = self.directory / "console"

    def __enter__(self) -> Started:
        self.directory.chmod(0o755)
        with contextlib.ExitStack() as ours:
            vhost = self.listen("vhost", ours)
            guest = self.listen("guest", ours)
            exit_file = ours.enter_context(open(self.exit_path, "wb"))
            ready, told = os.pipe()
            self.ready = self._stack.enter_context(open(ready, "rb"))
            ours.callback(os.close, told)
            log = ours.enter_context(open(self.log_path, "wb"))
            source, sink = os.pipe()
            ours.callback(os.close, source)
            kernel = self.options.get("transport", "vhost-user") == "vhost-vsock"
            config = ShimConfig(
                **{
                    "argv": tuple(self.command),
                    "env": {"PATH": "/usr/bin:/bin", "HERE": str(self.directory)},
                    "cid": 7,
                    "vhost_listen_fd": None if kernel else vhost.fileno(),
                    "guest_listen_fd": guest.fileno(),
                    "exit_fd": exit_file.fileno(),
                    "ready_fd": told,
                    "term_seconds": 0.5,
                    **self.options,
                }
            )
            program = ["-c", self.shim] if self.shim else ["-m", "services.hypervisor.shim"]
            self.process = subprocess.Popen(
                [sys.executable, *program, "--config-fd", str(source)],
                cwd=repository(),
                pass_fds=(source, *config.inherited_fds()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self.user,
                group=self.user,
                extra_groups=None if self.user is None else [],
            )
            with open(sink, "wb") as pipe:
                pipe.write(config.to_json())
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(20)

    def listen(self, name: str, stack: contextlib.ExitStack) -> socket.socket:
        """A listening socket."""
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.bind(f"{self.directory}/{name}")
        os.chmod(f"{self.directory}/{name}", 0o777)
        sock.listen()
        return sock

    def spawned(self) -> int:
        """QEMU's pid."""
        word, pid = self.ready.readline().split()
        assert word == b"spawned"
        return int(pid)

    def end(self, seconds: float = 20) -> ExitRecord:
        """Wait for the shim; the record it left."""
        self.process.wait(seconds)
        record = ExitRecord.from_json(self.exit_path.read_bytes())
        assert record is not None, self.log_path.read_text()
        return record


@contextlib.contextmanager
def watched(pid: int) -> Iterator[int]:
    """A pidfd of a process that may end at any time."""
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def gone(pidfd: int, seconds: float = 10) -> bool:
    """Whether the process ends within `seconds`."""
    return bool(select.select([pidfd], [], [], seconds)[0])


def test_an_exit_code_is_recorded() -> None:
    with Started("exit 3") as shim:
        record = shim.end()
        assert (record.exit_code, record.signal, record.reason) == (3, None, "exited")
        assert record.at > 1.7e9
        assert shim.process.returncode == 0


def test_a_signal_is_recorded() -> None:
    with Started("kill -SEGV $$") as shim:
        record = shim.end()
        assert (record.exit_code, record.signal, record.reason) == (None, signal.SIGSEGV, "exited")


def test_a_program_that_cannot_be_started_is_recorded() -> None:
    with Started(["/nowhere/qemu"]) as shim:
        record = shim.end()
        assert (record.exit_code, record.signal, record.reason) == (None, None, "spawn-failed")
        assert "/nowhere/qemu" in record.detail
        assert shim.process.returncode == 1


def test_sigterm_is_passed_on() -> None:
    read, write = os.pipe()
    command = f"trap 'exit 7' TERM; echo up > /proc/self/fd/{write}; while :; do sleep 0.1; done"
    with Started(command, pass_fds=(write,), term_seconds=10) as shim:
        assert os.read(read, 3) == b"up\n"
        shim.process.terminate()
        record = shim.end()
        assert (record.exit_code, record.signal, record.reason) == (7, None, "terminated")
        assert shim.process.returncode == 0
    os.close(read)
    os.close(write)


def test_who_ignores_sigterm_is_killed() -> None:
    read, write = os.pipe()
    command = f"trap '' TERM; echo up > /proc/self/fd/{write}; exec sleep 1000"
    with Started(command, pass_fds=(write,)) as shim:
        assert os.read(read, 3) == b"up\n"
        shim.process.terminate()
        record = shim.end()
        assert (record.signal, record.reason) == (signal.SIGKILL, "terminated")
        assert "0.5 s" in record.detail
    os.close(read)
    os.close(write)


def test_a_killed_shim_takes_its_machine_along() -> None:
    with Started("exec sleep 1000") as shim, watched(shim.spawned()) as machine:
        shim.process.kill()
        assert gone(machine)
        assert shim.exit_path.read_bytes() == b""


def test_the_machine_inherits_what_it_is_given_and_nothing_else() -> None:
    read, write = os.pipe()
    script = "ls -l /proc/self/fd > $HERE/fds; env > $HERE/env; cat /proc/self/status > $HERE/status"
    with Started(script, pass_fds=(write,)) as shim:
        os.close(write)
        shim.end()
        fds = [line.split()[8] for line in (shim.directory / "fds").read_text().splitlines()[1:]]
        # 3 is the directory that ls reads.
        assert sorted(map(int, fds)) == sorted({0, 1, 2, 3, write})
        names = {line.split("=")[0] for line in (shim.directory / "env").read_text().splitlines()}
        assert names - {"PWD", "_", "SHLVL", "OLDPWD"} == {"PATH", "HERE"}
        status = (shim.directory / "status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t0" in status, "QEMU brings its own"
        [ignored] = [line for line in status.splitlines() if line.startswith("SigIgn")]
        # 32 and 33 are the C library's own; whoever started us may have ignored them, and no call of it
        # can take that back (signal(7)).
        ours = ~(0b11 << 31)
        assert int(ignored.split()[1], 16) & ours == 0
    os.close(read)


def test_the_shim_keeps_nothing_of_the_machines() -> None:
    """Else whoever holds the other end of QMP would not see QEMU's end."""
    read, write = os.pipe()
    with Started("exec sleep 1000", pass_fds=(write,)) as shim, watched(shim.spawned()) as machine:
        os.close(write)
        signal.pidfd_send_signal(machine, signal.SIGKILL)
        assert os.read(read, 1) == b""
        shim.end()
    os.close(read)


def test_the_console_is_kept(tmp_path: Path) -> None:
    read, write = os.pipe()
    out = f"/proc/self/fd/{write}"
    command = f"echo hello > {out}; head -c 200000 /dev/zero > {out}; echo world > {out}"
    with open(tmp_path / "console", "w+b") as log:
        console_ring.create(log.fileno())
        given: dict[str, Any] = {"console_read_fd": read, "console_log_fd": log.fileno()}
        with Started(command, pass_fds=(write,), **given) as shim:
            os.close(read)
            os.close(write)
            assert shim.end().exit_code == 0
        assert console_ring.end(log.fileno()) == 200012
        assert console_ring.read(log.fileno(), 200006)[1] == b"world\n"


@pytest.mark.skipif(not ROOT, reason="only root can become another user")
def test_root_becomes_who_it_is_told_to() -> None:
    with Started("id -u; id -g; id -G; exec sleep 1000", uid=65534, gid=65533, groups=(65532,)) as shim:
        pid = shim.spawned()
        for process in (pid, shim.process.pid):
            status = Path(f"/proc/{process}/status").read_text()
            assert "Uid:\t65534\t65534\t65534\t65534" in status
            assert "Gid:\t65533\t65533\t65533\t65533" in status
            assert "CapEff:\t0000000000000000" in status
            assert "Groups:\t65532 \n" in status
        shim.process.terminate()
        shim.end()


@needs_another_user
def test_a_plain_user_may_not_become_another_and_needs_not() -> None:
    with Started("true", user=65534, uid=0, gid=0) as shim:
        record = shim.end()
        assert record.reason == "setup-failed"
        assert "only root" in record.detail
    with Started("exit 4", user=65534) as shim:
        assert shim.end().exit_code == 4
    with Started("exit 5", user=65534, uid=65534, gid=65534) as shim:
        assert shim.end().exit_code == 5


def test_root_that_stays_root_is_warned_of() -> None:
    with Started("true") as shim:
        shim.end()
        assert ("runs as root" in shim.log_path.read_text()) == ROOT


def called(arguments: list[str], fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[bytes]:
    """The shim run to its end with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "services.hypervisor.shim", *arguments],
        cwd=repository(),
        pass_fds=fds,
        capture_output=True,
        check=False,
        timeout=60,
    )


def test_a_descriptor_that_is_not_open_is_named() -> None:
    config = ShimConfig(argv=("/bin/true",), cid=3, vhost_listen_fd=200, guest_listen_fd=201)
    with tempfile.TemporaryFile() as file:
        file.write(config.to_json())
        file.seek(0)
        done = called(["--config-fd", str(file.fileno())], (file.fileno(),))
    assert b"descriptor 200 is not open" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "content"),
    [
        ([], b""),
        (["--config-fd", "x"], b""),
        (["--config-fd", "99"], b""),
        (None, b"{"),
        (None, b" " * 2000000),
    ],
)
def test_a_wrong_call_is_refused(arguments: list[str] | None, content: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        words = ["--config-fd", str(file.fileno())] if arguments is None else arguments
        done = called(words, (file.fileno(),))
    assert done.returncode == 64
    assert done.stderr.startswith(b"shim: ")


DEFECT = """
from services.hypervisor import shim
def broken(self):
    raise ZeroDivisionError("a defect")
shim.VsockDevice.work = broken
shim.main()
"""


def test_a_defect_of_the_device_kills_the_machine_and_is_recorded() -> None:
    with Started("exec sleep 1000", shim=DEFECT) as shim, watched(shim.spawned()) as machine:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{shim.directory}/guest")
            record = shim.end()
        assert gone(machine)
        assert (record.signal, record.reason) == (signal.SIGKILL, "device-failed")
        assert "ZeroDivisionError: a defect" in record.detail
        assert "broken" in record.detail
        assert "device-failed" in shim.log_path.read_text()


VIOLATION = """
from services.hypervisor import shim
shim.VsockDevice.work = lambda self: open("/etc/hostname")
shim.main()
"""


def test_a_violation_of_the_seccomp_list_kills_shim_and_machine() -> None:
    with Started("exec sleep 1000", shim=VIOLATION) as shim, watched(shim.spawned()) as machine:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{shim.directory}/guest")
            assert gone(machine)
        assert shim.process.wait(10) == -signal.SIGSYS


MACHINE = """
import array, os, socket, sys
sys.path.insert(0, sys.argv[1])
from services.hypervisor.vsock.vhost_user import *
sock = socket.socket(socket.AF_UNIX)
sock.connect(os.environ["HERE"] + "/vhost")
fd = os.memfd_create("x")
kick = os.eventfd(0)
def send(request, body, *fds):
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([HEADER.pack(request, VERSION, len(body)) + body], rights)
send(Request.SET_MEM_TABLE, MEMORY_COUNT.pack(1, 0) + MEMORY_REGION.pack(0, 1 << 20, 0x10000, 0), fd)
send(Request.SET_VRING_NUM, VRING_STATE.pack(0, 8))
send(Request.SET_VRING_ADDR, VRING_ADDRESS.pack(0, 0, 0x10000, 0x12000, 0x11000, 0))
send(Request.SET_VRING_KICK, U64.pack(0), kick)
import time
time.sleep(1000)
"""


def test_a_machine_whose_memory_is_not_there_is_ended() -> None:
    """It lies about its own addresses; all it loses is itself."""
    with Started([os.path.realpath(sys.executable), "-c", MACHINE, str(repository())]) as shim:
        assert shim.spawned()
        assert shim.ready.readline() == b"connected\n"
        record = shim.end()
        assert (record.signal, record.reason) == (signal.SIGKILL, "memory-lost")


GARBAGE = """
import os, socket, time
sock = socket.socket(socket.AF_UNIX)
sock.connect(os.environ["HERE"] + "/vhost")
sock.send(b"\\xff" * 100)
try:
    assert sock.recv(1) == b""
except ConnectionResetError:
    pass  # what it did not read
"""


def test_a_machine_that_talks_garbage_is_only_disconnected() -> None:
    with Started([os.path.realpath(sys.executable), "-c", GARBAGE]) as shim:
        assert shim.end().exit_code == 0
        assert "broke the vhost-user protocol" in shim.log_path.read_text()


def test_a_host_with_vhost_vsock_gets_the_relay() -> None:
    """Without a device to dial, the client is told within its time limit."""
    with Started("exec sleep 1000", transport="vhost-vsock", connect_seconds=0.3) as shim:
        shim.spawned()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(f"{shim.directory}/guest")
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        shim.process.terminate()
        assert shim.end().reason == "terminated"


def test_the_log_does_not_grow_with_what_a_guest_does() -> None:
    code = "from services.hypervisor.shim import Log\nlog = Log(3)\nfor n in range(10000): log('x')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository(), capture_output=True, check=True, timeout=60
    )
    assert 50 <= done.stderr.count(b"\n") <= 60


def test_the_shim_imports_nothing_heavy_and_starts_fast() -> None:
    code = """
import sys
import services.hypervisor.shim
heavy = {"grpc", "google", "asyncio", "logging", "threading", "subprocess", "ssl"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=repository(), check=True, timeout=60)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with Started("true") as shim:
        shim.end()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # 70 ms of processor time here; wall time would measure how busy the machine is.
    assert used < 0.3
