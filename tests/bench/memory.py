"""What an idle box takes of the host, what its agent takes of the guest, and what a small box has left."""

from __future__ import annotations

import asyncio
import statistics
import time

from services.imager.guest_store import GuestImage
from tests.bench.row import Row
from tests.vm import BOX_KEY, Client
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

MIB = 1 << 20
BOXES, IDLE_SECONDS, SAMPLES = 4, 180.0, 6
SMALL_MIB = 128
# Limits from the project's requirements.
PRIVATE_LIMIT_MIB, AGENT_LIMIT_MIB, AVAILABLE_LEAST_MIB = 60, 40, 60


async def idle_boxes(client: Client, image: GuestImage, memory_mib: int) -> list[Row]:
    """Boxes that have run a program each and then nothing, over three minutes."""
    names = [f"idle-{image.flavor}-{number}" for number in range(BOXES)]
    for name in names:
        await _create(client, image, name, memory_mib)
        await client.run(name, "true")
    proportional, private = [], []
    for _ in range(SAMPLES):
        await asyncio.sleep(IDLE_SECONDS / SAMPLES)
        for name in names:
            answer = await client.hypervisor.GetBoxStats(pb.GetBoxStatsRequest(box_id=name))
            proportional.append(answer.proportional_bytes / MIB)
            private.append(answer.private_bytes / MIB)
    seen = await _guest(client, names[0])
    for name in names:
        await client.delete(name)
    return [
        Row(
            what=f"private memory of an idle box, {image.flavor} kernel, {IDLE_SECONDS / 60:g} minutes",
            value=statistics.median(private),
            floor_name=f"its share of all memory, {BOXES} boxes",
            floor=statistics.median(proportional),
            unit="MiB",
            limit=PRIVATE_LIMIT_MIB,
        ),
        Row(
            what=f"resident memory of PID 1 and the agent, {image.flavor} kernel",
            value=seen.agent_memory_bytes / MIB,
            floor_name="all memory that the guest has in use",
            floor=(seen.memory_total_bytes - seen.memory_available_bytes) / MIB,
            unit="MiB",
            limit=AGENT_LIMIT_MIB,
        ),
    ]


async def small_box(client: Client, image: GuestImage) -> Row:
    """What a box of 128 MiB has left for programs."""
    name = f"small-{image.flavor}"
    await _create(client, image, name, SMALL_MIB)
    ended, _, _ = await client.run(name, "true")
    assert ended.exit_code == 0
    seen = await _guest(client, name)
    await client.delete(name)
    return Row(
        what=f"memory for programs in a box of {SMALL_MIB} MiB, {image.flavor} kernel",
        value=seen.memory_available_bytes / MIB,
        floor_name="what is asked for",
        floor=AVAILABLE_LEAST_MIB,
        unit="MiB",
        least=1,
    )


async def _create(client: Client, image: GuestImage, name: str, memory_mib: int) -> None:
    files = {"kernel_path": str(image.kernel), "initramfs_path": str(image.initramfs)}
    await client.create(name, **files, resources={"memory_mib": memory_mib})


async def _guest(client: Client, name: str) -> guest_pb2.TelemetryResponse:
    """One measurement by the guest's own agent."""
    call = client.guest.Telemetry(guest_pb2.TelemetryRequest(), metadata=((BOX_KEY, name),), timeout=60)
    began = time.monotonic()
    async for measured in call:
        call.cancel()
        return measured
    raise RuntimeError(f"no telemetry within {time.monotonic() - began:.0f} s")
