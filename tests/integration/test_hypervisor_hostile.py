"""Guests that attack or fall silent: their box fails with a clear error, and no other box notices."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.common.errors import VoidboxError
from services.hypervisor.pidfd import children
from services.imager import cpio
from tests.soak import census
from tests.soak.faults import Witness
from tests.vm import BOX_KEY, ROOT, Client, HypervisorProcess, guest_image, refused
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

# Runs beside the agent, and becomes the driver as soon as a program of that name runs.
INIT = b"""#!/bin/busybox sh
(
    while ! /bin/busybox grep -qs 'attack-no[w]' /proc/[0-9]*/cmdline; do /bin/busybox sleep 0.2; done
    exec /usr/bin/python3.11 -IS /hostile_driver.py >/dev/console 2>&1
) &
exec /agent-init
"""
DRIVER = Path(__file__).with_name("hostile_driver.py")


@pytest.fixture(scope="module")
def service() -> Iterator[HypervisorProcess]:
    with HypervisorProcess() as process:
        yield process


@pytest.fixture
async def client(service: HypervisorProcess) -> AsyncIterator[Client]:
    async with service.connected() as connected:
        yield connected


@pytest.fixture
async def witness(client: Client) -> AsyncIterator[Witness]:
    """A box that must not notice."""
    found = Witness()
    await found.start(client)
    yield found
    await found.goes_on()
    await found.leave()
    await client.delete("witness")


def hostile_initramfs(directory: Path) -> Path:
    """The default guest image's, with the attacker beside the agent."""
    overlay = io.BytesIO()
    files = [
        cpio.file("init", INIT, 0o755),
        cpio.file("agent-init", (ROOT / "guest/init").read_bytes(), 0o755),
        cpio.file("hostile_driver.py", DRIVER.read_bytes()),
    ]
    cpio.write_archive(files, overlay)
    path = directory / "hostile.cpio"
    path.write_bytes(guest_image().initramfs.read_bytes() + overlay.getvalue())
    return path


async def start(client: Client, box: str, *words: str) -> None:
    """Start a program that goes on after this call."""
    call = client.guest.Exec(metadata=((BOX_KEY, box),), timeout=60)
    begin = guest_pb2.ExecStart(program="sh", args=["-c", "sleep 1000; true", *words], detach=True)
    await call.write(guest_pb2.ExecRequest(start=begin))
    assert (await anext(aiter(call))).event.HasField("started")
    call.cancel()


async def printed(client: Client, box: str, until: bytes) -> bytes:
    """The console of a box up to these bytes."""
    seen = b""
    follow = client.hypervisor.ReadConsole(pb.ReadConsoleRequest(box_id=box, follow=True), timeout=300)
    async for piece in follow:
        seen += piece.data
        if until in seen:
            follow.cancel()
            return seen
    raise AssertionError(f"the console ended: {seen[-2000:].decode(errors='replace')}")


def processor_seconds(pid: int) -> float:
    """What a process has used of the processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_a_driver_that_lies_to_the_vsock_device_harms_its_own_box_alone(
    service: HypervisorProcess, client: Client, witness: Witness, tmp_path: Path
) -> None:
    box = await client.create("hostile", initramfs_path=str(hostile_initramfs(tmp_path)), cold_boot=True)
    shim = next(pid for pid in census.holding(service.layout.box("hostile")) if box.vmm_pid in children(pid))
    before = census.memory_mib(shim)
    await start(client, "hostile", "attack-now")
    said = (await printed(client, "hostile", b"hostile: done")).decode(errors="replace")
    # The attack was one: the device has taken what it was given, before and after the worst.
    consumed = [int(number) for number in re.findall(r"flood consumed (\d+)", said)]
    assert len(consumed) == 2, said[-3000:]
    assert min(consumed) > 0, said[-3000:]
    assert said.count("hostile: round") == 40
    await witness.goes_on()
    assert census.memory_mib(shim) - before < 8
    # It has nothing to do any more, and must not spin.
    used, began = processor_seconds(shim), time.monotonic()
    for _ in range(5):
        await witness.goes_on()
    assert processor_seconds(shim) - used < 0.5 * (time.monotonic() - began)
    # Nobody answers in there; whoever asks is told so in time.
    call = client.guest.GetGuest(guest_pb2.GetGuestRequest(), metadata=((BOX_KEY, "hostile"),), timeout=3)
    assert isinstance(await refused(call), VoidboxError)
    assert (await client.get("hostile")).state == pb.BOX_STATE_RUNNING
    stopped = await client.hypervisor.StopBox(pb.StopBoxRequest(box_id="hostile"), timeout=60)
    assert stopped.box.state == pb.BOX_STATE_STOPPED
    await client.delete("hostile")
    assert not service.layout.box("hostile").exists()


@pytest.mark.parametrize("silent", ["machine", "device"])
async def test_a_box_that_falls_silent_is_told_of_and_can_be_ended(
    service: HypervisorProcess, client: Client, witness: Witness, silent: str
) -> None:
    box = await client.create("silent")
    await start(client, "silent")
    directory = service.layout.box("silent")
    shim = next(pid for pid in census.holding(directory) if box.vmm_pid in children(pid))
    os.kill(box.vmm_pid if silent == "machine" else shim, signal.SIGSTOP)
    for call in (
        client.guest.ListExecs(guest_pb2.ListExecsRequest(), metadata=((BOX_KEY, "silent"),), timeout=2),
        client.hypervisor.CreateSnapshot(pb.CreateSnapshotRequest(box_id="silent", name="no"), timeout=5),
    ):
        error = await refused(call)
        assert error.message, repr(error)
    await witness.goes_on()
    assert (await client.get("silent")).state == pb.BOX_STATE_RUNNING
    async with asyncio.timeout(120):
        ended = await client.hypervisor.StopBox(pb.StopBoxRequest(box_id="silent"), timeout=120)
    assert ended.box.state == pb.BOX_STATE_STOPPED
    await client.delete("silent")
    assert not directory.exists()
    assert list(service.layout.machines.iterdir()) == []
    assert not (await client.hypervisor.ListSnapshots(pb.ListSnapshotsRequest())).snapshots
