"""Boxes come and go, one after the other, and afterwards the host is as before.

The whole stack runs: every call goes through the orchestrator. Most boxes come from the warm pool
or from the template, some boot, and now and then a run of the orchestrator makes one.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from rich.table import Table

from services.common.address import Address
from services.common.channel import open_channel
from tests.e2e.voidbox_cli import Voidbox, pipeline, program_box, stack
from tests.soak import census
from tests.soak.census import Census
from tests.soak.waiting import all_wait
from tests.vm import Client
from voidbox.orchestrator.v1 import orchestrator_pb2, orchestrator_pb2_grpc

# A run every so many cycles, and a box that boots (4 s under emulation, where a restored one takes 1 s).
RUN_EVERY, COLD_EVERY = 25, 100
# Before this many, caches fill: sessions, compiled code, the allocator's arenas.
WARM_UP_SHARE = 0.2
# What the slope of a service's private memory may be, in KiB per cycle; 500 cycles are then 1 MiB.
MEMORY_KIB_PER_CYCLE = 2.0
_RUN_SECONDS = 120.0
_MEMORY = {"memory_mib": 320}


@dataclass(slots=True)
class Course:
    """What was seen: the census after so many cycles, and how boxes came to be."""

    points: list[tuple[int, Census]] = field(default_factory=list)
    origins: dict[str, int] = field(default_factory=dict)

    @property
    def after_warm_up(self) -> list[tuple[int, Census]]:
        """The points that count."""
        last = self.points[-1][0]
        return [point for point in self.points if point[0] >= last * WARM_UP_SHARE]

    def memory_slopes(self) -> dict[str, float]:
        """By service, the growth of its private memory in KiB per cycle."""
        points = self.after_warm_up
        return {
            name: census.slope([(number, each.memory_mib[name] * 1024) for number, each in points])
            for name in points[0][1].memory_mib
        }

    def failures(self) -> list[str]:
        """What has grown, in words."""
        (first, before), *_, (last, after) = self.after_warm_up
        found = [
            f"{name}: {pair[0]} after {first} cycles, {pair[1]} after {last}"
            for name, pair in census.grown(before, after).items()
        ]
        found += [
            f"memory of {name} grows by {value:.2f} KiB per cycle, more than {MEMORY_KIB_PER_CYCLE}"
            for name, value in self.memory_slopes().items()
            if value > MEMORY_KIB_PER_CYCLE
        ]
        return found

    def table(self) -> Table:
        """All points, one a line."""
        made = ", ".join(f"{count} {origin}" for origin, count in sorted(self.origins.items()))
        services = list(self.points[0][1].memory_mib)
        table = Table(title=f"{self.points[-1][0]} cycles of create, exec, delete ({made})")
        for column in ("cycles", *census.COUNTED, "file MiB", *(f"{each}, MiB" for each in services)):
            table.add_column(column, justify="right")
        for number, each in self.points:
            counts = (str(getattr(each, name)) for name in census.COUNTED)
            memory = (f"{each.memory_mib[name]:.1f}" for name in services)
            table.add_row(str(number), *counts, f"{each.file_mib:.1f}", *memory)
        slopes = (f"{value:+.2f} KiB/cycle" for value in self.memory_slopes().values())
        table.add_section()
        table.add_row("slope", *("" for _ in census.COUNTED), "", *slopes)
        return table


async def cycle(client: Client, number: int, course: Course) -> None:
    """One box from its start to its end, with a program in between."""
    box_id = f"cycle-{number}"
    cold = number % COLD_EVERY == COLD_EVERY - 1
    box = await client.create(box_id, resources=_MEMORY, cold_boot=cold)
    course.origins[box.origin] = course.origins.get(box.origin, 0) + 1
    ended, out, error = await client.run(box_id, "sh", "-c", "echo $0 > /tmp/x; cat /tmp/x", str(number))
    assert (ended.exit_code, out) == (0, b"%d\n" % number), error
    await client.delete(box_id)


async def run_once(client: Client, number: int) -> None:
    """A run of the orchestrator, followed to its end and deleted."""
    runs: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub
    runs = orchestrator_pb2_grpc.OrchestratorServiceStub(client.channel)  # type: ignore[assignment]
    run_id = f"soak-{number}"
    document = pipeline(run_id, program_box("one", "echo", "done"))
    document["sandbox"] = {"memory_mb": _MEMORY["memory_mib"]}
    content = orchestrator_pb2.SpecDocument(content=json.dumps(document).encode(), filename="soak.json")
    request = orchestrator_pb2.CreateRunRequest(run_id=run_id, spec=content, base_directory="/")
    await runs.CreateRun(request, timeout=_RUN_SECONDS)
    async for _ in runs.WatchRun(orchestrator_pb2.WatchRunRequest(run_id=run_id), timeout=_RUN_SECONDS):
        pass
    run = (await runs.GetRun(orchestrator_pb2.GetRunRequest(run_id=run_id))).run
    assert run.state == orchestrator_pb2.RUN_STATE_SUCCEEDED, run
    await runs.DeleteRun(orchestrator_pb2.DeleteRunRequest(run_id=run_id))


async def cycles(
    voidbox: Voidbox, count: int, every: int, tell: Callable[[str], None]
) -> AsyncIterator[Course]:
    """Go through `count` cycles; yields what has been seen so far after each `every`."""
    found = voidbox.status()["stack"]["services"]
    services = {str(each["name"]): int(each["pid"]) for each in found}
    course = Course()
    for number in range(count + 1):
        # A client of its own each time: what a service holds for one must go with it.
        async with open_channel(Address(path=voidbox.runtime / "orchestrator.sock")) as channel:
            client = Client(channel)
            if number % every == 0:
                machines = voidbox.state / "hypervisor/machines"
                log = voidbox.state / "log/hypervisor.log"
                await all_wait(client, machines, log, {"pool", "ready"}, _MEMORY["memory_mib"])
        if number % every == 0:
            first = course.points[0][1] if course.points else None
            course.points.append((number, await census.settled(voidbox.root, services, first)))
            tell(f"{number} of {count} cycles: {course.points[-1][1]}")
            yield course
        if number == count:
            return
        async with open_channel(Address(path=voidbox.runtime / "orchestrator.sock")) as channel:
            client = Client(channel)
            await cycle(client, number, course)
            if number % RUN_EVERY == RUN_EVERY - 1:
                await run_once(client, number)
                course.origins["run"] = course.origins.get("run", 0) + 1


def pooled_stack(voidbox: Voidbox) -> None:
    """Start the stack with a warm pool of one, and temporary files where they are counted."""
    scratch = voidbox.root / "tmp"
    scratch.mkdir()
    voidbox.env |= {"VOIDBOX_HYPERVISOR_POOL_SIZE": "1", "TMPDIR": str(scratch)}
    voidbox("up")


async def measure(count: int, every: int, tell: Callable[[str], None]) -> Course:
    """All of it, on a stack of its own, which leaves nothing behind either."""
    with stack() as voidbox:
        pooled_stack(voidbox)
        async for course in cycles(voidbox, count, every, tell):
            last = course
    assert not os.path.exists(voidbox.root)
    return last
