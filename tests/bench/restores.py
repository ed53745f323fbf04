"""Restores, the warm pool, saving and forking: what a box costs that does not boot."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

from rich.console import Console

from services.hypervisor import qmp, saved
from services.hypervisor.argv import EMULATED_CPU, kernel_command_line
from services.hypervisor.inotify import FileWatch
from services.hypervisor.model import Accelerator
from services.hypervisor.monitor import Monitor
from services.hypervisor.saved import Saved
from services.imager.guest_store import GuestImage
from tests.bench.floor import initramfs_of
from tests.bench.row import Row
from tests.vm import BOX_KEY, Client, HypervisorProcess, box_config
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

FORKS, FORK_LIMIT_SECONDS = 8, 5.0
HELD_MIB = 50
# Ten times what a restore takes.
ECHO_SECONDS = 30.0

ECHO_INIT = """#!/bin/busybox sh
/bin/busybox stty raw -echo < /dev/console
echo ready > /dev/console
while :; do /bin/busybox head -c 1 < /dev/console > /dev/console; done
"""

HOLDER = f"""
import os, time
held = os.urandom({HELD_MIB} << 20)
print("up", flush=True)
number = 0
while True:
    number += 1
    time.sleep(0.05)
"""


class Echo:
    """Bare QEMU with nothing but a RAM of `memory` and a serial port, which is `port`."""

    def __init__(self, memory_fd: int, memory_mib: int, share: bool, *more: str, fds: tuple[int, ...] = ()):
        self.port, port = socket.socketpair()
        monitor, theirs = socket.socketpair()
        backend = f"memory-backend-file,id=ram,size={memory_mib}M,mem-path=/dev/fd/{memory_fd}"
        argv = [
            "qemu-system-x86_64",
            *("-machine", "q35,accel=tcg,memory-backend=ram,suppress-vmdesc=on,vmport=off,usb=off"),
            *("-global", "migration.send-configuration=off"),
            *("-cpu", EMULATED_CPU, "-smp", "1", "-m", f"{memory_mib}M"),
            *("-object", f"{backend},share={'on' if share else 'off'}"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"),
            *("-chardev", f"socket,id=port,fd={port.fileno()}", "-serial", "chardev:port"),
            *("-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"),
            *more,
        ]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, pass_fds=(memory_fd, port.fileno(), theirs.fileno(), *fds)
        )
        port.close()
        theirs.close()
        self.connection = monitor
        self.monitor = Monitor()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Echo]:
        """Its monitor while the block runs; it is killed afterwards."""
        try:
            async with qmp.connect(self.connection, on_event=self.monitor.on_event) as client:
                self.monitor.client = client
                yield self
        finally:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
            self.port.close()

    async def read(self, wanted: bytes) -> None:
        """Return when the guest has sent `wanted`."""
        seen = b""
        async with asyncio.timeout(ECHO_SECONDS):
            self.port.setblocking(False)
            while wanted not in seen:
                seen += await asyncio.get_running_loop().sock_recv(self.port, 4096)


async def save_echo(image: GuestImage, memory_mib: int, scratch: Path) -> Saved:
    """A saved machine whose guest sends back each byte that it gets."""
    archive = scratch / "echo.cpio"
    archive.write_bytes(initramfs_of(image.initramfs, ECHO_INIT))
    machine = saved.empty(memory_mib)
    boot = ("-kernel", str(image.kernel), "-initrd", str(archive))
    line = ("-append", kernel_command_line(Accelerator.TCG, 1))
    async with Echo(machine.memory_fd, memory_mib, True, *boot, *line).connected() as echo:
        await echo.read(b"ready")
        echo.port.send(b"w")
        await echo.read(b"w")
        await echo.monitor.execute("stop")
        state = saved.reopened(machine.devices_fd, os.O_WRONLY)
        await echo.monitor.save(state)
        os.close(state)
    machine.seal()
    return machine


async def restore_echo(machine: Saved, memory_mib: int) -> float:
    """Seconds from the start of QEMU until the restored guest has answered one byte."""
    state = saved.reopened(machine.devices_fd, os.O_RDONLY)
    try:
        began = time.monotonic()
        echo = Echo(machine.memory_fd, memory_mib, False, "-incoming", "defer", "-S", fds=(state,))
        async with echo.connected():
            await echo.monitor.load(state)
            await echo.monitor.execute("cont")
            echo.port.send(b"x")
            await echo.read(b"x")
            return time.monotonic() - began
    finally:
        os.close(state)


def _phases(boxes: list[pb.Box]) -> str:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for box in boxes:
        for phase in box.phases:
            found[phase.name].append(phase.duration.ToTimedelta().total_seconds())
    return ", ".join(f"{name} {statistics.median(values) * 1000:.0f} ms" for name, values in found.items())


async def restores(
    client: Client, image: GuestImage, memory_mib: int, runs: int, scratch: Path, console: Console
) -> list[Row]:
    """Restore to first exec against bare QEMU; what saving adds to the boot."""
    echo = await save_echo(image, memory_mib, scratch)
    config = {"kernel_path": str(image.kernel), "initramfs_path": str(image.initramfs)}
    resources = {"memory_mib": memory_mib}
    values, floors, boxes, saves, boots = [], [], [], [], []
    for number in range(runs):
        for template in (await client.hypervisor.ListTemplates(pb.ListTemplatesRequest())).templates:
            await client.hypervisor.DeleteTemplate(pb.DeleteTemplateRequest(template_id=template.id))
        first = await client.create(f"first-{number}", **config, resources=resources)
        await client.delete(first.id)
        spent = {phase.name: phase.duration.ToTimedelta().total_seconds() for phase in first.phases}
        saves.append(spent["template-save"] * 1000)
        boots.append((spent["template-spawn"] + spent["template-boot"]) * 1000)
        floors.append(await restore_echo(echo, memory_mib))
        began = time.monotonic()
        boxes.append(await client.create(f"restored-{number}", **config, resources=resources))
        ended, _, _ = await client.run(f"restored-{number}", "true")
        values.append(time.monotonic() - began)
        assert ended.exit_code == 0
        await client.delete(f"restored-{number}")
    echo.close()
    console.print(f"restore, {image.flavor} kernel: {_phases(boxes)}")
    return [
        Row(
            what=f"restore to first exec, {image.flavor} kernel",
            value=statistics.median(values),
            floor_name="bare QEMU restoring the same kernel, until busybox answers one byte",
            floor=statistics.median(floors),
            unit="s",
            most=2,
        ),
        Row(
            what=f"saving a template, {image.flavor} kernel",
            value=statistics.median(saves),
            floor_name="the boot before it",
            floor=statistics.median(boots),
            unit="ms",
            limit=100,
        ),
    ]


async def filled(service: HypervisorProcess, client: Client) -> None:
    """Return once a machine waits in the pool."""
    request = pb.BuildTemplateRequest(config=box_config())
    with FileWatch(service.log) as written:
        while True:
            written.clear()
            if (await client.hypervisor.BuildTemplate(request, timeout=120)).template.pooled:
                return
            async with asyncio.timeout(60):
                await written.wait()


async def pooled(runs: int, console: Console) -> Row:
    """From the request for a box to the exit of its first program, from the pool; floor: one more program."""
    values, floors, boxes = [], [], []
    with HypervisorProcess(flags=["--pool-size", "1"]) as service:
        async with service.connected() as client:
            for number in range(runs):
                await filled(service, client)
                began = time.monotonic()
                boxes.append(await client.create(f"pooled-{number}"))
                await client.run(f"pooled-{number}", "true")
                values.append((time.monotonic() - began) * 1000)
                assert boxes[-1].origin == "pool"
                await filled(service, client)  # so that the next is not measured beside a restore
                for _ in range(3):
                    began = time.monotonic()
                    await client.run(f"pooled-{number}", "true")
                    floors.append((time.monotonic() - began) * 1000)
                await client.delete(f"pooled-{number}")
    console.print(f"from the pool: {_phases(boxes)}")
    return Row(
        what="from the warm pool to first exec",
        value=statistics.median(values),
        floor_name="one exec round trip in the same box",
        floor=statistics.median(floors),
        unit="ms",
        most=3,
    )


async def forks(client: Client, runs: int, console: Console) -> Row:
    """A running Python program that holds 50 MB, copied into eight that go on; floor: eight restores."""
    values, floors, pauses = [], [], []
    for number in range(runs):
        parent = f"parent-{number}"
        began = time.monotonic()
        names = [f"plain-{number}-{each}" for each in range(FORKS)]
        await asyncio.gather(*map(client.create, names))
        floors.append(time.monotonic() - began)
        for name in names:
            await client.delete(name)
        await client.create(parent)
        call = client.guest.Exec(metadata=((BOX_KEY, parent),), timeout=60)
        start = guest_pb2.ExecStart(program="python3", args=["-c", HOLDER], detach=True)
        await call.write(guest_pb2.ExecRequest(start=start))
        async for message in call:
            if message.event.output.data == b"up\n":
                break
        call.cancel()
        copies = [f"copy-{number}-{each}" for each in range(FORKS)]
        began = time.monotonic()
        answer = await client.hypervisor.ForkBox(
            pb.ForkBoxRequest(box_id=parent, fork_ids=copies), timeout=120
        )
        values.append(time.monotonic() - began)
        pauses.append(answer.pause.ToTimedelta().total_seconds())
        for name in (*copies, parent):
            await client.delete(name)
    console.print(f"forks: the original stood still for {statistics.median(pauses) * 1000:.0f} ms")
    return Row(
        what=f"fork of a Python program with {HELD_MIB} MB into {FORKS}",
        value=statistics.median(values),
        floor_name=f"{FORKS} boxes from the template at once",
        floor=statistics.median(floors),
        unit="s",
        limit=FORK_LIMIT_SECONDS,
    )
