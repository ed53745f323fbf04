"""Restores, the warm pool, saving and forking: what a box costs that does not boot."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console

from services.hypervisor.inotify import FileWatch
from services.imager.guest_store import GuestImage
from tests.bench import port_floor
from tests.bench.row import Row
from tests.vm import BOX_KEY, Client, HypervisorProcess, box_config
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

FORKS, FORK_LIMIT_SECONDS = 8, 5.0
HELD_MIB = 50
HOLDER = f"""
import os, time
held = os.urandom({HELD_MIB} << 20)
print("up", flush=True)
number = 0
while True:
    number += 1
    time.sleep(0.05)
"""


def _phases(boxes: list[pb.Box]) -> str:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for box in boxes:
        for phase in box.phases:
            found[phase.name].append(phase.duration.ToTimedelta().total_seconds())
    return ", ".join(f"{name} {statistics.median(values) * 1000:.0f} ms" for name, values in found.items())


async def started_ahead(service: HypervisorProcess) -> None:
    """Return once a QEMU waits for a box to be restored into it."""
    with FileWatch(service.log) as written:
        while True:
            written.clear()
            said = service.log.read_text()
            if any(f"machine {each.name} waits" in said for each in service.layout.machines.iterdir()):
                return
            async with asyncio.timeout(60):
                await written.wait()


async def restores(
    service: HypervisorProcess,
    client: Client,
    image: GuestImage,
    memory_mib: int,
    runs: int,
    scratch: Path,
    console: Console,
) -> list[Row]:
    """Restore to first exec against bare QEMU; what saving adds to the boot."""
    floors = [await port_floor.save(image, memory_mib, scratch, plugged=plugged) for plugged in (True, False)]
    config = {"kernel_path": str(image.kernel), "initramfs_path": str(image.initramfs)}
    resources = {"memory_mib": memory_mib}
    values, boxes, saves, boots = [], [], [], []
    answers: list[list[float]] = [[], []]
    for number in range(runs):
        for template in (await client.hypervisor.ListTemplates(pb.ListTemplatesRequest())).templates:
            await client.hypervisor.DeleteTemplate(pb.DeleteTemplateRequest(template_id=template.id))
        first = await client.create(f"first-{number}", **config, resources=resources)
        await client.delete(first.id)
        spent = {phase.name: phase.duration.ToTimedelta().total_seconds() for phase in first.phases}
        saves.append(spent["template-save"] * 1000)
        boots.append((spent["template-spawn"] + spent["template-boot"]) * 1000)
        await started_ahead(service)
        for floor, seconds in zip(floors, answers, strict=True):
            seconds.append(await floor.restore())
        began = time.monotonic()
        boxes.append(await client.create(f"restored-{number}", **config, resources=resources))
        ended, _, _ = await client.run(f"restored-{number}", "true")
        values.append(time.monotonic() - began)
        assert ended.exit_code == 0
        await client.delete(f"restored-{number}")
    for floor in floors:
        floor.machine.close()
    console.print(f"restore, {image.flavor} kernel: {_phases(boxes)}")
    bare = (
        "bare QEMU restoring the same kernel and guest image, until Python answers a byte over a virtio port"
    )
    return [
        Row(
            what=f"restore to first exec, {image.flavor} kernel",
            value=statistics.median(values),
            floor_name=f"{bare} that is plugged in",
            floor=statistics.median(answers[0]),
            unit="s",
            most=2,
        ),
        Row(
            what=f"the same, {image.flavor} kernel",
            value=statistics.median(values),
            floor_name=f"{bare} that was there when it was saved",
            floor=statistics.median(answers[1]),
            unit="s",
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
