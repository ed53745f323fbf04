"""Many boxes at once, each with a program that runs, and what they take of the host's memory."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.table import Table

from services.hypervisor.admission import OVERHEAD_MIB, Host
from tests.soak import census
from tests.vm import BOX_KEY, Client, HypervisorProcess, box_config
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

BOXES, MEMORY_MIB = 64, 256
IDLE_SECONDS = 180.0
# What a box that does nothing may keep for itself.
IDLE_MIB = 60
# Under emulation on two processors, 64 starts take minutes.
_START_SECONDS = 600.0
_MIB = 1 << 20
COUNT = "n=0; while :; do n=$((n+1)); echo $n > /tmp/n; sleep 5; done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """What was measured: seconds until all ran a program, and each box's PSS in MiB at two moments."""

    boxes: int
    seconds: float
    first: list[float]
    idle: list[float]
    host_mib: int
    taken_mib: int
    overcommit: float
    accelerator: str
    left: dict[str, tuple[int, int]]

    def failures(self) -> list[str]:
        """What is not as it must be, in words."""
        found = [f"{name}: {before} before, {after} after" for name, (before, after) in self.left.items()]
        if max(self.idle) > IDLE_MIB:
            found.append(f"an idle box keeps {max(self.idle):.0f} MiB for itself, more than {IDLE_MIB}")
        return found

    def table(self) -> Table:
        """One line a figure."""
        title = f"{self.boxes} boxes of {MEMORY_MIB} MiB on {self.host_mib} MiB by {self.accelerator}"
        table = Table(title=title)
        for column in ("figure", "median", "least", "most", "all"):
            table.add_column(column, justify="left" if column == "figure" else "right")
        for name, values in (("PSS once all run, MiB", self.first), ("PSS when idle, MiB", self.idle)):
            figures = (statistics.median(values), min(values), max(values), sum(values))
            table.add_row(name, *(f"{value:.1f}" for value in figures))
        table.add_row("until all ran a program, s", "", "", "", f"{self.seconds:.0f}")
        table.add_row("taken of the host's free memory, MiB", "", "", "", str(self.taken_mib))
        table.add_row("memory_overcommit", "", "", "", f"{self.overcommit:g}")
        return table


async def up(client: Client, box_id: str) -> None:
    """A box with a program that goes on after this call."""
    config = box_config(resources={"memory_mib": MEMORY_MIB})
    request = pb.CreateBoxRequest(box_id=box_id, config=config)
    request.start_timeout.FromSeconds(int(_START_SECONDS))
    await client.hypervisor.CreateBox(request, timeout=_START_SECONDS)
    call = client.guest.Exec(metadata=((BOX_KEY, box_id),), timeout=_START_SECONDS)
    start = guest_pb2.ExecStart(program="sh", args=["-c", COUNT], detach=True)
    await call.write(guest_pb2.ExecRequest(start=start))
    assert (await anext(aiter(call))).event.HasField("started")
    call.cancel()


async def shares(client: Client, ids: list[str]) -> list[float]:
    """The PSS of each box in MiB."""
    asked = [client.hypervisor.GetBoxStats(pb.GetBoxStatsRequest(box_id=each)) for each in ids]
    return [stats.proportional_bytes / _MIB for stats in await asyncio.gather(*asked)]


async def measure(boxes: int, idle_seconds: float, tell: Callable[[str], None]) -> Crowd:
    """Start them, let them idle, see that each program still runs, and end them."""
    host = Host.measure()
    promised = boxes * (MEMORY_MIB + OVERHEAD_MIB)
    # As a user sets it: promises add up to what the boxes' memory is, whatever part of it they touch.
    overcommit = max(1.0, -(-promised * 10 // host.memory_mib) / 10)
    flags = ["--memory-overcommit", str(overcommit), "--pool-size", "0", "--ready-size", "0"]
    with HypervisorProcess(flags=flags) as service:
        assert service.process is not None
        services = {"hypervisor": service.process.pid}
        async with service.connected() as client:
            config = box_config(resources={"memory_mib": MEMORY_MIB})
            await client.hypervisor.BuildTemplate(pb.BuildTemplateRequest(config=config), timeout=120)
            before = await asyncio.to_thread(census.take, service.directory, services)
            free = Host.measure().available_mib
            began = time.monotonic()
            ids = [f"crowd-{number}" for number in range(boxes)]
            await asyncio.gather(*(up(client, each) for each in ids))
            seconds = time.monotonic() - began
            tell(f"{boxes} boxes run a program after {seconds:.0f} s")
            first = await shares(client, ids)
            await asyncio.sleep(idle_seconds)
            idle = await shares(client, ids)
            taken = free - Host.measure().available_mib
            for each in ids:
                ended, out, _ = await client.run(each, "cat", "/tmp/n")
                assert ended.exit_code == 0
                assert int(out) >= idle_seconds / 10, f"the program of {each} has stood still"
            number = (await client.get(ids[0])).accelerator
            accelerator = pb.Accelerator.Name(number).removeprefix("ACCELERATOR_")
            await asyncio.gather(*(client.delete(each) for each in ids))
        left = census.grown(before, await asyncio.to_thread(census.take, service.directory, services))
    return Crowd(
        boxes=boxes,
        seconds=seconds,
        first=first,
        idle=idle,
        host_mib=host.memory_mib,
        taken_mib=taken,
        overcommit=overcommit,
        accelerator=accelerator,
        left=left,
    )
