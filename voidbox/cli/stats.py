"""`voidbox stats`: what boxes take of the host, and what their guests have left."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from google.protobuf import duration_pb2

from services.common.errors import NotFound, VoidboxError
from voidbox.cli.boxes import RUNNING, find_box
from voidbox.cli.connection import Context
from voidbox.cli.interrupts import until_interrupted
from voidbox.cli.screen import size, table
from voidbox.client import BOX_KEY, CALL_SECONDS, Client, rpc_errors
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as hv

_HEADER = (
    "BOX",
    "CPU",
    "HOST MEM",
    "PRIVATE",
    "GUEST MEM",
    "PROCS",
    "DISK R/W",
    "NET IN/OUT",
    "VSOCK IN/OUT",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A box at one moment; `cpu` is the host's processors in use since the sample before, 1.0 being one."""

    box: str
    cpu: float
    host: hv.GetBoxStatsResponse
    guest: guest_pb2.TelemetryResponse

    def row(self) -> tuple[object, ...]:
        """The columns of `_HEADER`."""
        guest, host = self.guest, self.host
        used = guest.memory_total_bytes - guest.memory_available_bytes
        return (
            self.box,
            f"{self.cpu:.0%}",
            size(host.proportional_bytes),
            size(host.private_bytes),
            f"{size(used)} / {size(guest.memory_total_bytes)}",
            guest.process_count,
            f"{size(guest.disk_read_bytes)} / {size(guest.disk_written_bytes)}",
            f"{size(guest.network_received_bytes)} / {size(guest.network_sent_bytes)}",
            f"{size(host.vsock_sent_bytes)} / {size(host.vsock_received_bytes)}",
        )

    def data(self) -> dict[str, object]:
        """The same for programs; bytes, and processors as a fraction of one."""
        guest, host = self.guest, self.host
        return {
            "box_id": self.box,
            "cpu": round(self.cpu, 4),
            "cpu_seconds": host.cpu_time.ToNanoseconds() / 1e9,
            "resident_bytes": host.resident_bytes,
            "proportional_bytes": host.proportional_bytes,
            "private_bytes": host.private_bytes,
            "overlay_bytes": host.disk_bytes,
            "vsock_sent_bytes": host.vsock_sent_bytes,
            "vsock_received_bytes": host.vsock_received_bytes,
            "guest_cpu_seconds": guest.cpu_time.ToNanoseconds() / 1e9,
            "guest_memory_total_bytes": guest.memory_total_bytes,
            "guest_memory_available_bytes": guest.memory_available_bytes,
            "guest_processes": guest.process_count,
            "guest_agent_bytes": guest.agent_memory_bytes,
            "guest_disk_read_bytes": guest.disk_read_bytes,
            "guest_disk_written_bytes": guest.disk_written_bytes,
            "guest_network_received_bytes": guest.network_received_bytes,
            "guest_network_sent_bytes": guest.network_sent_bytes,
        }


def stats_command(context: Context) -> int:
    """Measure boxes once, or again and again."""
    stack = context.stack()
    args = context.args

    async def show() -> None:
        async with stack.connect() as client:
            chosen = [await find_box(client, name) for name in args.boxes]
            while True:
                boxes = chosen or [box.id async for box in client.list_boxes() if box.state in RUNNING]
                samples = await _measure(client, boxes, args.interval)
                _print(context, samples)
                if not args.watch or (chosen and not samples):
                    return

    return asyncio.run(until_interrupted(show()))


def _print(context: Context, samples: list[Sample]) -> None:
    if context.screen.json:
        for sample in samples:
            context.screen.data(sample.data())
        return
    if context.args.watch and context.screen.live:
        print("\x1b[H\x1b[2J", end="")
    print(table(_HEADER, [sample.row() for sample in samples], right=range(1, len(_HEADER))), flush=True)


async def _measure(client: Client, boxes: list[str], interval: float) -> list[Sample]:
    """Samples of the boxes that live through the interval, all over the same one."""
    if not boxes:
        await asyncio.sleep(interval)
    found = await asyncio.gather(*(_sample(client, box, interval) for box in boxes))
    return [sample for sample in found if sample is not None]


async def _sample(client: Client, box: str, interval: float) -> Sample | None:
    try:
        before, begin = await _host(client, box), time.monotonic()
        guest = await _guest(client, box, interval)
        after, end = await _host(client, box), time.monotonic()
    except NotFound:
        return None
    except VoidboxError as error:
        if error.reason in ("BOX_DIED", "BOX_NOT_RUNNING"):
            return None
        raise
    used = (after.cpu_time.ToNanoseconds() - before.cpu_time.ToNanoseconds()) / 1e9
    return Sample(box=box, cpu=max(0.0, used / (end - begin)), host=after, guest=guest)


async def _host(client: Client, box: str) -> hv.GetBoxStatsResponse:
    request = hv.GetBoxStatsRequest(box_id=box)
    return await client.call(lambda: client.hypervisor.GetBoxStats(request, timeout=CALL_SECONDS))


async def _guest(client: Client, box: str, interval: float) -> guest_pb2.TelemetryResponse:
    """What the guest tells at the end of the interval."""
    step = duration_pb2.Duration()
    step.FromNanoseconds(round(interval * 1e9))
    call = client.guest.Telemetry(
        guest_pb2.TelemetryRequest(interval=step), metadata=((BOX_KEY, box),), timeout=CALL_SECONDS + interval
    )
    try:
        with rpc_errors():
            async for answer in call:
                if answer.sequence >= 1:
                    return answer
    finally:
        call.cancel()
    raise NotFound(f"box {box} has ended", reason="BOX_DIED", box=box)
