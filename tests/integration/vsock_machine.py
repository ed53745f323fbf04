"""A real machine with our vsock device, started through the real shim, and a test server inside.

The guest is the default guest image with another `/init` laid over it (a second cpio archive after
the first; the kernel unpacks both in order).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.common.paths import Paths
from services.hypervisor.shim_config import ExitRecord, ShimConfig
from services.imager import cpio
from services.imager.guest_store import load_guest_image

ROOT = Path(__file__).resolve().parents[2]
SERVER = Path(__file__).with_name("vsock_guest_server.py")
QEMU = shutil.which("qemu-system-x86_64") or "/usr/bin/qemu-system-x86_64"
BOOT_SECONDS = 90.0
"""A cold boot under emulation takes 4 to 10 s on an idle machine."""
STREAM_SECONDS = 60.0
PATTERN = hashlib.shake_128(b"voidbox").digest(1 << 20)
"""As in the guest's server."""

INIT = b"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in $(/bin/busybox cat /lib/modules/voidbox/boot); do /bin/busybox insmod $module; done
exec /usr/bin/python3.11 -IS /vsock_guest_server.py
"""


def pattern(count: int, seed: int = 0) -> bytes:
    """`count` bytes of what the guest's `source` sends."""
    start = seed % len(PATTERN)
    repeats = (start + count) // len(PATTERN) + 1
    return (PATTERN * repeats)[start : start + count]


def listener(path: Path, uid: int | None) -> socket.socket:
    """A listening unix socket that `uid` may connect to."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(300)
    if uid is not None:
        os.chown(path, uid, -1)
    return sock


class Machine:
    """One machine; a context manager that proves at its end that nothing is left."""

    def __init__(
        self,
        *,
        backend: str = "memfd",
        share: bool = False,
        uid: int | None = None,
        started_by: int | None = None,
        reboots: bool = False,
        append: str = "",
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vsk-"))
        self.guest_socket = self.directory / "guest.sock"
        self.console = self.directory / "console"
        self.log = self.directory / "log"
        self.ram = self.directory / "ram"
        self.uid = uid
        self._started_by = started_by
        self._owner = started_by if uid is None else uid
        self.qemu_pid = 0
        self._backend = backend
        self._share = "on" if share else "off"
        self._reboots = reboots
        self._append = append
        self._monitor: io.BufferedRWPair | None = None
        self._events: list[dict[str, Any]] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Machine:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            if hasattr(self, "shim"):
                self.stop()
        shutil.rmtree(self.directory)

    def _argv(self, kernel: str, initramfs: Path) -> list[str]:
        memory = f"memory-backend-{self._backend},id=ram,size=320M,share={self._share}"
        if self._backend == "file":
            memory += f",mem-path={self.ram}"
        return [
            QEMU,
            *("-machine", "q35,memory-backend=ram", "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-m", "320M", "-smp", "2", "-object", memory, "-nodefaults", "-no-user-config"),
            *("-display", "none", "-serial", f"file:{self.console}"),
            *([] if self._reboots else ["-no-reboot"]),
            *("-kernel", kernel, "-initrd", str(initramfs)),
            *("-append", f"console=ttyS0 quiet panic=-1 no_timer_check {self._append}"),
            *("-chardev", f"socket,id=vsock,path={self.directory}/vhost.sock"),
            *("-device", "pcie-root-port,id=rp0,chassis=1", "-device", "pcie-root-port,id=rp1,chassis=2"),
            *("-device", "vhost-user-vsock-pci,id=vs0,chardev=vsock,bus=rp0"),
            *("-qmp", f"unix:{self.directory}/qmp.sock,server=on,wait=off"),
            *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        ]

    def _start(self) -> None:
        image = load_guest_image(Paths.from_env(os.environ).cache)
        initramfs = self.directory / "initramfs"
        overlay = io.BytesIO()
        files = [cpio.file("init", INIT, 0o755), cpio.file("vsock_guest_server.py", SERVER.read_bytes())]
        cpio.write_archive(files, overlay)
        initramfs.write_bytes(image.initramfs.read_bytes() + overlay.getvalue())
        if self._backend == "file":
            self.ram.write_bytes(b"")
            os.truncate(self.ram, 320 << 20)
        if self._owner is not None:
            for path in (self.directory, *self.directory.iterdir()):
                os.chown(path, self._owner, -1)
        with contextlib.ExitStack() as ours:
            vhost = ours.enter_context(listener(self.directory / "vhost.sock", self._owner))
            guest = ours.enter_context(listener(self.guest_socket, self._owner))
            kernel = ours.enter_context(open(image.kernel, "rb"))
            exit_file = ours.enter_context(open(self.directory / "exit.json", "wb"))
            ready, told = os.pipe()
            self.ready = self._stack.enter_context(open(ready, "rb"))
            ours.enter_context(open(told, "wb"))
            source, sink = os.pipe()
            ours.enter_context(open(source, "rb"))
            config = ShimConfig(
                argv=tuple(self._argv(f"/proc/self/fd/{kernel.fileno()}", initramfs)),
                env={"PATH": "/usr/bin:/bin"},
                uid=self.uid,
                gid=None if self.uid is None else 65534,
                pass_fds=(kernel.fileno(),),
                cid=42,
                vhost_listen_fd=vhost.fileno(),
                guest_listen_fd=guest.fileno(),
                exit_fd=exit_file.fileno(),
                ready_fd=told,
                term_seconds=3.0,
            )
            log = ours.enter_context(open(self.log, "wb"))
            self.shim = subprocess.Popen(
                [sys.executable, "-m", "services.hypervisor.shim", "--config-fd", str(source)],
                cwd=ROOT,
                pass_fds=(source, *config.inherited_fds()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self._started_by,
                group=self._started_by,
                extra_groups=None if self._started_by is None else [],
            )
            with open(sink, "wb") as pipe:
                pipe.write(config.to_json())
        self.qemu_pid = int(self.expect("spawned").split()[1])
        self.qemu = os.pidfd_open(self.qemu_pid)
        self._stack.callback(os.close, self.qemu)

    def expect(self, word: str) -> str:
        """The next line of `ready_fd`, which starts with `word`."""
        line = self.ready.readline().decode()
        assert line.startswith(word), f"{line!r} instead of {word}; {self.evidence()}"
        return line

    def evidence(self) -> str:
        """What to look at when something went wrong."""
        texts = []
        for path in (self.log, self.console):
            with contextlib.suppress(OSError):
                texts.append(f"{path.name}: {path.read_text(errors='replace')[-3000:]}")
        return "\n".join(texts)

    def qmp(self, command: str, **arguments: object) -> object:
        """Run a QMP command and return its result."""
        if self._monitor is None:
            sock = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(30)
            sock.connect(str(self.directory / "qmp.sock"))
            self._monitor = self._stack.enter_context(sock.makefile("rwb"))
            self._monitor.readline()
            self.qmp("qmp_capabilities")
        assert self._monitor is not None
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._monitor.flush()
        while True:
            answer = json.loads(self._monitor.readline())
            if "event" in answer:
                self._events.append(answer)
                continue
            assert "return" in answer, answer
            return answer["return"]

    def qmp_event(self, name: str, **data: object) -> None:
        """Wait for an event with (at least) this data."""
        assert self._monitor is not None
        while True:
            for event in self._events:
                if event["event"] == name and data.items() <= event["data"].items():
                    self._events.remove(event)
                    return
            self._events.append(json.loads(self._monitor.readline()))

    def connect(self, command: str, seconds: float = STREAM_SECONDS) -> socket.socket:
        """A stream to the guest's server that has been told `command`."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(seconds)
            sock.connect(str(self.guest_socket))
            sock.sendall(command.encode() + b"\n")
        except OSError:
            sock.close()
            raise
        return sock

    def ask(self, command: str, data: bytes = b"") -> bytes:
        """Send `command` and `data`, end, and read the answer to its end."""
        with self.connect(command) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    def wait_up(self) -> None:
        """Return once the guest's server answers."""
        deadline = BOOT_SECONDS
        for _ in range(int(deadline / 9)):
            # The device holds each connect for up to 10 s while the guest is still starting.
            with self.connect("echo", BOOT_SECONDS) as sock:
                with contextlib.suppress(ConnectionError, BrokenPipeError):
                    sock.sendall(b"?")
                    if sock.recv(1) == b"?":
                        return
        raise AssertionError(f"the guest did not come up; {self.evidence()}")

    def exit_record(self) -> ExitRecord | None:
        """What the shim left."""
        return ExitRecord.from_json((self.directory / "exit.json").read_bytes())

    def rss(self) -> int:
        """Bytes of memory the shim uses."""
        pages = int(Path(f"/proc/{self.shim.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu(self) -> float:
        """Seconds of processor time the shim has used."""
        words = Path(f"/proc/{self.shim.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Terminate the shim if it runs, and prove that shim and QEMU are gone."""
        if self.shim.poll() is None:
            self.shim.send_signal(signal.SIGTERM)
        self.shim.wait(20)
        assert self.qemu_gone(10), "QEMU outlived its shim"

    def qemu_gone(self, seconds: float) -> bool:
        """Whether the machine's process ends within `seconds`."""
        if not hasattr(self, "qemu"):
            return True
        return bool(select.select([self.qemu], [], [], seconds)[0])


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end."""
    parts = []
    while data := sock.recv(1 << 18):
        parts.append(data)
    return b"".join(parts)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """`count` bytes."""
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(min(count - len(data), 1 << 18))
        assert piece, f"the stream ended after {len(data)} of {count} bytes"
        data += piece
    return bytes(data)


@contextlib.contextmanager
def running(**options: object) -> Iterator[Machine]:
    """A machine whose server answers."""
    with Machine(**options) as machine:  # type: ignore[arg-type]
        machine.expect("connected")
        machine.wait_up()
        yield machine
