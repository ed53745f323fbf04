"""`voidbox stats`: what boxes take of the host, and what their guests have left."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from dataclasses import dataclass

from google.protobuf import duration_pb2

from services.common.errors import NotFound, TimedOut, VoidboxError
from voidbox.cli.boxes import RUNNING, box_state, find_box
from voidbox.cli.connection import Context
from voidbox.cli.interrupts import until_interrupted
from voidbox.cli.screen import size, table
from voidbox.client import BOX_KEY, CALL_SECONDS, Client, rpc_errors
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as hv

_HEADER = (
    "BOX",
    "STATE",
    "CPU",
    "GUEST CPU",
    "HOST MEM",
    "PRIVATE",
    "SWAP",
    "GUEST MEM",
    "PROCS",
    "DISK R/W",
    "NET IN/OUT",
    "VSOCK IN/OUT",
)
_COUNTERS = {
    "disk_read": "disk_read_bytes",
    "disk_written": "disk_written_bytes",
    "network_received": "network_received_bytes",
    "network_sent": "network_sent_bytes",
}
"""Rates of the guest, and the counter of its telemetry that each is of."""

_SHOWN = frozenset((hv.BOX_STATE_RUNNING, hv.BOX_STATE_PAUSED))

Telemetry = tuple[guest_pb2.TelemetryResponse, guest_pb2.TelemetryResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A box over an interval: measurements at its begin and end.

    A paused box has no `guest`: who looks on does not let it go on.
    """

    box: str
    state: str
    seconds: float
    host: tuple[hv.GetBoxStatsResponse, hv.GetBoxStatsResponse]
    guest: Telemetry | None

    @property
    def cpu(self) -> float:
        """The host's processors in use, 1.0 being one."""
        before, after = self.host
        used = after.cpu_time.ToNanoseconds() - before.cpu_time.ToNanoseconds()
        return max(0.0, used / 1e9 / self.seconds)

    @property
    def guest_cpu(self) -> float:
        """The guest's processors in use, 1.0 being one."""
        if self.guest is None:
            return 0.0
        before, after = self.guest
        passed = max(1, after.time.ToNanoseconds() - before.time.ToNanoseconds())
        return max(0.0, (after.cpu_time.ToNanoseconds() - before.cpu_time.ToNanoseconds()) / passed)

    def rate(self, counter: str) -> float:
        """Bytes per second of a counter of the guest's."""
        if self.guest is None:
            return 0.0
        before, after = self.guest
        passed = max(1, after.time.ToNanoseconds() - before.time.ToNanoseconds()) / 1e9
        return max(0.0, float(getattr(after, counter) - getattr(before, counter)) / passed)

    def host_rate(self, counter: str) -> float:
        """Bytes per second of a counter of the host's."""
        before, after = self.host
        return max(0.0, float(getattr(after, counter) - getattr(before, counter)) / self.seconds)

    def row(self, *, rates: bool) -> tuple[object, ...]:
        """The columns of `_HEADER`; what flows per second, or in all since the start."""
        host, guest = self.host[1], self.guest[1] if self.guest else None
        suffix = "/s" if rates else ""

        def pair(one: float, other: float) -> str:
            return f"{size(one)}{suffix} / {size(other)}{suffix}"

        def flow(*counters: str) -> str:
            if guest is None:
                return "-"
            return pair(*(self.rate(each) if rates else getattr(guest, each) for each in counters))

        vsock = ("vsock_sent_bytes", "vsock_received_bytes")
        total = guest.memory_total_bytes if guest else 0
        used = total - guest.memory_available_bytes if guest else 0
        return (
            self.box,
            self.state,
            f"{self.cpu:.0%}",
            f"{self.guest_cpu:.0%}" if guest else "-",
            size(host.proportional_bytes),
            size(host.private_bytes),
            size(host.swap_bytes),
            f"{size(used)} / {size(total)}" if guest else "-",
            guest.process_count if guest else "-",
            flow("disk_read_bytes", "disk_written_bytes"),
            flow("network_received_bytes", "network_sent_bytes"),
            pair(*(self.host_rate(each) if rates else getattr(host, each) for each in vsock)),
        )

    def data(self) -> dict[str, object]:
        """The same for programs; bytes, bytes per second, and processors as a fraction of one."""
        host = self.host[1]
        told: dict[str, object] = {
            "box_id": self.box,
            "state": self.state,
            "cpu": round(self.cpu, 4),
            "cpu_seconds": host.cpu_time.ToNanoseconds() / 1e9,
            "resident_bytes": host.resident_bytes,
            "proportional_bytes": host.proportional_bytes,
            "private_bytes": host.private_bytes,
            "swap_bytes": host.swap_bytes,
            "overlay_bytes": host.disk_bytes,
            "host_disk_read_bytes": host.disk_read_bytes,
            "host_disk_written_bytes": host.disk_written_bytes,
            "vsock_sent_bytes": host.vsock_sent_bytes,
            "vsock_received_bytes": host.vsock_received_bytes,
            "vsock_sent_per_second": round(self.host_rate("vsock_sent_bytes")),
            "vsock_received_per_second": round(self.host_rate("vsock_received_bytes")),
        }
        if self.guest is None:
            return told
        guest = self.guest[1]
        return told | {
            "guest_cpu": round(self.guest_cpu, 4),
            "guest_cpu_seconds": guest.cpu_time.ToNanoseconds() / 1e9,
            "guest_memory_total_bytes": guest.memory_total_bytes,
            "guest_memory_available_bytes": guest.memory_available_bytes,
            "guest_processes": guest.process_count,
            "guest_agent_bytes": guest.agent_memory_bytes,
            "guest_disk_read_bytes": guest.disk_read_bytes,
            "guest_disk_written_bytes": guest.disk_written_bytes,
            "guest_network_received_bytes": guest.network_received_bytes,
            "guest_network_sent_bytes": guest.network_sent_bytes,
            **{f"guest_{name}_per_second": round(self.rate(each)) for name, each in _COUNTERS.items()},
        }


def stats_command(context: Context) -> int:
    """Measure boxes once, or again and again."""
    stack = context.stack()
    args = context.args

    async def show() -> None:
        async with stack.connect() as client:
            chosen = [await find_box(client, name, _SHOWN) for name in args.boxes]
            while True:
                boxes = [box async for box in client.list_boxes() if box.state in _SHOWN]
                wanted = [box for box in boxes if not chosen or box.id in chosen]
                samples = await _measure(client, wanted, args.interval)
                _print(context, samples)
                if not args.watch or (chosen and not samples):
                    return

    return asyncio.run(until_interrupted(show()))


def _print(context: Context, samples: list[Sample]) -> None:
    if context.screen.json:
        for sample in samples:
            context.screen.data(sample.data())
        return
    watch = context.args.watch
    rows = [sample.row(rates=watch) for sample in samples]
    text = table(_HEADER, rows, right=range(2, len(_HEADER)))
    if watch and context.screen.live:
        text = repaint(text, shutil.get_terminal_size())
    print(text, flush=True, end="" if watch and context.screen.live else "\n")


def repaint(text: str, terminal: os.terminal_size) -> str:
    """`text` for a terminal that shows an older one: drawn over it, which does not flicker.

    Lines are cut to the terminal's width, and there are no more than it has.
    """
    lines = [line[: terminal.columns] for line in text.splitlines()]
    if len(lines) >= terminal.lines:
        kept = max(1, terminal.lines - 2)
        lines = [*lines[:kept], f"… {len(lines) - kept} more"[: terminal.columns]]
    return "\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J"


async def _measure(client: Client, boxes: list[hv.Box], interval: float) -> list[Sample]:
    """Samples of the boxes that live through the interval, all over the same one."""
    if not boxes:
        await asyncio.sleep(interval)
    found = await asyncio.gather(*(_sample(client, box, interval) for box in boxes))
    return [sample for sample in found if sample is not None]


async def _sample(client: Client, box: hv.Box, interval: float) -> Sample | None:
    try:
        before, begin = await _host(client, box.id), time.monotonic()
        guest = None
        if box.state in RUNNING:
            guest = await _guest(client, box.id, interval)
        else:
            await asyncio.sleep(interval)
        after, end = await _host(client, box.id), time.monotonic()
    except NotFound:
        return None
    except VoidboxError as error:
        if error.reason in ("BOX_DIED", "BOX_NOT_RUNNING"):
            return None
        raise
    return Sample(box=box.id, state=box_state(box), seconds=end - begin, host=(before, after), guest=guest)


async def _host(client: Client, box: str) -> hv.GetBoxStatsResponse:
    request = hv.GetBoxStatsRequest(box_id=box)
    return await client.call(lambda: client.hypervisor.GetBoxStats(request, timeout=CALL_SECONDS))


async def _guest(client: Client, box: str, interval: float) -> Telemetry | None:
    """What the guest tells at both ends of the interval; None if it is paused meanwhile."""
    step = duration_pb2.Duration()
    step.FromNanoseconds(round(interval * 1e9))
    call = client.guest.Telemetry(
        guest_pb2.TelemetryRequest(interval=step), metadata=((BOX_KEY, box),), timeout=CALL_SECONDS + interval
    )
    first: guest_pb2.TelemetryResponse | None = None
    try:
        with rpc_errors():
            async for answer in call:
                if first is not None:
                    return first, answer
                first = answer
    except TimedOut:
        # Who only looks on does not keep a box from being paused; it stands still then.
        return None
    finally:
        call.cancel()
    raise NotFound(f"box {box} has ended", reason="BOX_DIED", box=box)
