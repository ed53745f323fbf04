"""The floor of a restore: bare QEMU, the same kernel and guest image, one byte over a virtio port.

The machine is a template's but for who is PID 1: the guest image's Python, which echoes what comes in on
a virtio port. Files of a template have no such port in them, nor any other device of a box: like a box's
it is plugged in after the load (`plugged`). For comparison, also with the port in the saved machine.
No shim, no confinement, no identity; Python answers because the guest image's userland is Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.hypervisor import qmp, saved
from services.hypervisor.argv import EMULATED_CPU, SAVED_PORTS, TRANSLATION_MIB, kernel_command_line
from services.hypervisor.model import Accelerator
from services.hypervisor.monitor import Monitor
from services.hypervisor.saved import Saved
from services.imager import cpio
from services.imager.guest_store import GuestImage

# Twenty times what the slowest step takes: a boot.
SECONDS: Final = 120.0

INIT: Final = """#!/usr/bin/python3.11 -IS
import os, socket, sys, time
sys.path.append("/usr/lib/voidbox/site")
from guest import boot
from guest.settings import Settings
settings = Settings()
boot.mount_all(boot.FIRST_MOUNTS)
boot.load_modules(f"{settings.modules}/boot")
boot.load_lazy(settings, "console")
events = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15)
events.bind((0, 1))
os.write(1, b"ready\\n")
while not (ports := [name for name in os.listdir("/dev") if name.startswith("vport")]):
    events.recv(8192)
port = -1
while port < 0:
    try:
        port = os.open("/dev/" + ports[0], os.O_RDWR)
    except OSError:  # ENXIO: the driver makes the node a moment before it knows the port
        time.sleep(0.001)
while True:
    if byte := os.read(port, 1):
        os.write(port, byte)
    else:  # the host has not opened its end yet
        time.sleep(0.001)
"""

_PORT: Final = {"driver": "virtserialport", "bus": "serial.0", "chardev": "port", "nr": 1, "id": "answer"}


@dataclass(frozen=True, slots=True)
class Floor:
    """A saved machine, and whether its port has to be plugged in when it is restored."""

    machine: Saved
    memory_mib: int
    plugged: bool

    async def restore(self) -> float:
        """Seconds from the start of QEMU until the restored guest has answered one byte."""
        state = saved.reopened(self.machine.devices_fd, os.O_RDONLY)
        try:
            began = time.monotonic()
            extra = ["-incoming", "defer", "-S"]
            qemu = _Qemu(self.machine.memory_fd, self.memory_mib, "off", not self.plugged, extra, state)
            async with qemu.connected():
                await qemu.monitor.load(state)
                if self.plugged:
                    await qemu.plug_port()
                await qemu.monitor.execute("cont")
                await qemu.echo(b"x")
                return time.monotonic() - began
        finally:
            os.close(state)


async def save(image: GuestImage, memory_mib: int, scratch: Path, *, plugged: bool) -> Floor:
    """A saved machine of a guest image for `Floor.restore`."""
    archive = scratch / f"port-{plugged}.cpio"
    more = io.BytesIO()
    cpio.write_archive([cpio.file("floor", INIT.encode(), 0o755)], more)
    archive.write_bytes(image.initramfs.read_bytes() + more.getvalue())
    machine = saved.empty(memory_mib)
    line = f"{kernel_command_line(Accelerator.TCG, 1)} rdinit=/floor"
    extra = ["-kernel", str(image.kernel), "-initrd", str(archive), "-append", line]
    qemu = _Qemu(machine.memory_fd, memory_mib, "on", not plugged, extra)
    async with qemu.connected():
        await qemu.ready()
        if not plugged:
            await qemu.echo(b"w")
        await qemu.monitor.execute("stop")
        state = saved.reopened(machine.devices_fd, os.O_WRONLY)
        await qemu.monitor.save(state)
        os.close(state)
    archive.unlink()
    machine.seal()
    return Floor(machine, memory_mib, plugged)


class _Qemu:
    """The process, with sockets to its monitor, its console and its port."""

    def __init__(
        self, memory_fd: int, memory_mib: int, share: str, has_port: bool, extra: list[str], *fds: int
    ):
        pairs = {name: socket.socketpair() for name in ("monitor", "console", "port")}
        theirs = {name: pair[1] for name, pair in pairs.items()}
        self._ours = {name: pair[0] for name, pair in pairs.items()}
        ram = f"id=ram,size={memory_mib}M,mem-path=/dev/fd/{memory_fd},share={share}"
        argv = [
            "qemu-system-x86_64",
            *("-machine", "q35,memory-backend=ram,suppress-vmdesc=on,vmport=off,usb=off"),
            *("-accel", f"tcg,tb-size={TRANSLATION_MIB}", "-cpu", EMULATED_CPU, "-smp", "1"),
            *("-m", f"{memory_mib}M", "-object", f"memory-backend-file,{ram}"),
            *("-global", "migration.send-configuration=off"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"),
            *(word for name, end in theirs.items()
              for word in ("-chardev", f"socket,id={name},fd={end.fileno()}")),
            *("-serial", "chardev:console", "-mon", "chardev=monitor,mode=control"),
            *(word for n in range(SAVED_PORTS)
              for word in ("-device", f"pcie-root-port,id=port{n},chassis={n + 1},slot={n + 1}")),
            *("-object", "rng-builtin,id=entropy", "-device", "virtio-rng-pci,rng=entropy"),
            *("-device", "vmgenid,guid=auto,id=generation"),
        ]  # fmt: skip
        if has_port:
            argv += ["-device", "virtio-serial-pci,id=serial,bus=port0"]
            argv += ["-device", ",".join(f"{key}={value}" for key, value in _PORT.items())]
        passed = [memory_fd, *fds, *(end.fileno() for end in theirs.values())]
        self.process = subprocess.Popen([*argv, *extra], stdin=subprocess.DEVNULL, pass_fds=passed)
        for end in theirs.values():
            end.close()
        self.monitor = Monitor()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Its monitor while the block runs; it is killed afterwards."""
        try:
            async with qmp.connect(self._ours["monitor"], on_event=self.monitor.on_event) as client:
                self.monitor.client = client
                yield
        finally:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
            for end in self._ours.values():
                end.close()

    async def plug_port(self) -> None:
        """Plug the port in while the machine is stopped, so that the guest is told once."""
        await self.monitor.execute(
            "device_add", {"driver": "virtio-serial-pci", "id": "serial", "bus": "port0"}
        )
        await self.monitor.execute("device_add", _PORT)

    async def ready(self) -> None:
        """Return when the guest waits for its port."""
        await self._read("console", b"ready")

    async def echo(self, byte: bytes) -> None:
        """Send one byte and return when it has come back."""
        self._ours["port"].send(byte)
        await self._read("port", byte)

    async def _read(self, name: str, wanted: bytes) -> None:
        seen = b""
        self._ours[name].setblocking(False)
        async with asyncio.timeout(SECONDS):
            while wanted not in seen:
                try:
                    piece = await asyncio.get_running_loop().sock_recv(self._ours[name], 4096)
                except ConnectionError:
                    piece = b""
                if not piece:
                    raise RuntimeError(f"QEMU has ended: {self._ours['console'].recv(4096)!r}")
                seen += piece
