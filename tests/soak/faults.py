"""Processes are killed at random points of what a hypervisor does, and nobody but their box notices.

Each turn one action is under way (a box is created, restored, forked, saved, stopped, deleted) and
one victim is killed at a random point of it: the hypervisor, a machine (QEMU) or its device process
(the shim). Whatever the point: the caller gets a result or a clear error; a witness box runs its
program throughout, its output without a gap; what was under way is there whole or not at all; and
once it has been deleted, the host is as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

import grpc
from rich.table import Table

from services.common.errors import Unavailable, VoidboxError, from_rpc_error
from services.hypervisor import record
from services.hypervisor.pidfd import children
from tests.soak import census
from tests.soak.census import Census
from tests.soak.waiting import all_wait
from tests.vm import BOX_KEY, Client, HypervisorProcess
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

Victim = Literal["hypervisor", "machine", "device"]
VICTIMS: tuple[Victim, ...] = ("hypervisor", "machine", "device")
# Each takes seconds under emulation; a busy host may need ten times as long.
_SECONDS = 240.0
# A machine that was found again is held by other descriptors than one that was made, and gRPC opens and
# keeps some when it likes. `cycles` counts them exactly, over hundreds of boxes of one service.
SPARE_DESCRIPTORS = 8
_LINES = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.1; done"


async def _create(client: Client) -> object:
    return await client.create("new")


async def _boot(client: Client) -> object:
    return await client.create("new", cold_boot=True)


async def _restore(client: Client) -> object:
    request = pb.CreateBoxRequest(box_id="new", config=pb.BoxConfig(snapshot="base"))
    return await client.hypervisor.CreateBox(request, timeout=_SECONDS)


async def _fork(client: Client) -> object:
    request = pb.ForkBoxRequest(box_id="subject", fork_ids=["new", "new-2"])
    return await client.hypervisor.ForkBox(request, timeout=_SECONDS)


async def _snapshot(client: Client) -> object:
    request = pb.CreateSnapshotRequest(box_id="subject", name="new")
    return await client.hypervisor.CreateSnapshot(request, timeout=_SECONDS)


async def _stop(client: Client) -> object:
    return await client.hypervisor.StopBox(pb.StopBoxRequest(box_id="subject"), timeout=_SECONDS)


async def _delete(client: Client) -> object:
    return await client.hypervisor.DeleteBox(pb.DeleteBoxRequest(box_id="subject"), timeout=_SECONDS)


async def _pause(client: Client) -> object:
    await client.hypervisor.PauseBox(pb.PauseBoxRequest(box_id="subject"), timeout=_SECONDS)
    return await client.hypervisor.ResumeBox(pb.ResumeBoxRequest(box_id="subject"), timeout=_SECONDS)


ACTIONS: dict[str, Callable[[Client], Awaitable[object]]] = {
    "create": _create,
    "boot": _boot,
    "restore": _restore,
    "fork": _fork,
    "snapshot": _snapshot,
    "stop": _stop,
    "delete": _delete,
    "pause": _pause,
}
NEW = ("create", "boot", "restore")
"""Actions whose victims are machines that they make; those of the others are the subject's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a victim is killed: at `share` of the time that the action takes."""

    action: str
    victim: Victim
    share: float


def points(seed: int, count: int, victims: tuple[Victim, ...] = VICTIMS) -> list[Point]:
    """`count` points for each victim, the actions in turn; the same for the same seed."""
    chance = random.Random(seed)
    found = []
    for victim in victims:
        names: list[str] = []
        while len(names) < count:
            names += chance.sample([*ACTIONS], len(ACTIONS))
        found += [Point(action=name, victim=victim, share=chance.random()) for name in names[:count]]
    chance.shuffle(found)
    return found


@dataclass(slots=True)
class Outcome:
    """What came of all turns."""

    seed: int
    rows: list[tuple[Point, float, str]] = field(default_factory=list)

    def failures(self) -> list[str]:
        """None: a turn that fails ends all with its error."""
        return []

    def table(self) -> Table:
        """One line a point."""
        table = Table(title=f"kill -9 at {len(self.rows)} points, seed {self.seed}")
        for column in ("action", "killed", "after", "what the caller got"):
            table.add_column(column, overflow="fold")
        for point, seconds, said in self.rows:
            table.add_row(point.action, point.victim, f"{seconds * 1000:.0f} ms", said)
        return table


class Witness:
    """A box whose program prints a line ten times a second and never misses one."""

    def __init__(self) -> None:
        self._seen = bytearray()
        self._grew = asyncio.Event()
        self._call: grpc.aio.StreamStreamCall[object, object] | None = None
        self._reader: asyncio.Task[None] | None = None
        self.vmm_pid = 0

    async def start(self, client: Client) -> None:
        """Make the box and start its program."""
        self.vmm_pid = (await client.create("witness")).vmm_pid
        call = client.guest.Exec(metadata=((BOX_KEY, "witness"),))
        start = guest_pb2.ExecStart(exec_id="lines", program="sh", args=["-c", _LINES], detach=True)
        await call.write(guest_pb2.ExecRequest(start=start))
        self._follow(call)

    async def attach(self, client: Client) -> None:
        """Go on reading where an earlier service was lost."""
        assert (await client.get("witness")).vmm_pid == self.vmm_pid, "the witness has another machine"
        call = client.guest.Attach(metadata=((BOX_KEY, "witness"),))
        opening = guest_pb2.AttachOpen(exec_id="lines", stdout_offset=len(self._seen))
        await call.write(guest_pb2.AttachRequest(open=opening))
        self._follow(call)

    def _follow(self, call: grpc.aio.StreamStreamCall) -> None:  # type: ignore[type-arg]
        self._call = call
        self._reader = asyncio.create_task(self._read(call))

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:  # type: ignore[type-arg]
        async for message in call:
            self._seen += message.event.output.data
            self._grew.set()

    async def goes_on(self) -> None:
        """Return once it has printed two more lines on the stream it had, having missed none."""
        assert self._reader is not None
        wanted = self._seen.count(b"\n") + 2
        async with asyncio.timeout(_SECONDS):
            while self._seen.count(b"\n") < wanted:
                self._grew.clear()
                grew = asyncio.ensure_future(self._grew.wait())
                await asyncio.wait({grew, self._reader}, return_when=asyncio.FIRST_COMPLETED)
                grew.cancel()
                assert not self._reader.done(), f"its stream has ended: {self._reader}"
        lines = self._seen.split(b"\n")[:-1]
        assert lines == [b"%d" % number for number in range(1, len(lines) + 1)], lines[-5:]

    async def leave(self) -> None:
        """Stop reading."""
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)


class Stage:
    """A service, its witness, and what the host held before."""

    def __init__(self, service: HypervisorProcess, *, pool: bool) -> None:
        self.service = service
        self.witness = Witness()
        self._pool = pool
        self._before: Census | None = None
        self._durations: dict[str, float] = {}
        self._connection = contextlib.AsyncExitStack()

    async def connect(self) -> None:
        """Open a connection to the service, which has just started."""
        self.client = await self._connection.enter_async_context(self.service.connected())

    async def close(self) -> None:
        """Remove the witness; nothing is left then."""
        await self.witness.leave()
        await self.client.delete("witness")
        await self._connection.aclose()

    async def prepare(self, actions: set[str]) -> None:
        """Make what the actions need, see how long each takes, and count what is there."""
        client = self.client
        await self.witness.start(client)
        await client.create("subject")
        await client.hypervisor.CreateSnapshot(
            pb.CreateSnapshotRequest(box_id="subject", name="base"), timeout=_SECONDS
        )
        await self._clean(client)
        for name in sorted(actions):
            if name not in NEW:
                await client.create("subject")
            began = time.monotonic()
            await ACTIONS[name](client)
            self._durations[name] = time.monotonic() - began
            await self._clean(client)
        await self._rest(client)
        found = await self._count(None)
        self._before = dataclasses.replace(found, descriptors=found.descriptors + SPARE_DESCRIPTORS)

    async def turn(self, point: Point) -> tuple[float, str]:
        """One action and one kill; when it came (in seconds), and what the caller was told."""
        if point.action not in NEW:
            await self.client.create("subject")
        after, said = await self._act(self.client, point)
        if point.victim == "hypervisor":
            await self.witness.leave()
            await self._connection.aclose()
            await asyncio.to_thread(self.service.restart)
            await self.connect()
            await self.witness.attach(self.client)
        await self._settle(self.client)
        await self.witness.goes_on()
        await self._compare()
        return after, said

    async def _act(self, client: Client, point: Point) -> tuple[float, str]:
        pids = asyncio.create_task(self._victims(client, point))
        if point.action in NEW and point.victim != "hypervisor":
            await asyncio.sleep(0)  # the watch begins before the action
        task = asyncio.ensure_future(ACTIONS[point.action](client))
        await asyncio.wait({task, pids}, return_when=asyncio.FIRST_COMPLETED)
        began = time.monotonic()
        await asyncio.wait({task}, timeout=self._durations[point.action] * point.share)
        after = time.monotonic() - began
        if point.victim == "hypervisor":
            self.service.kill()
        elif pids.done() and not pids.cancelled():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids.result(), signal.SIGKILL)
        pids.cancel()
        await asyncio.gather(pids, return_exceptions=True)
        async with asyncio.timeout(_SECONDS):
            result = (await asyncio.gather(task, return_exceptions=True))[0]
        if not isinstance(result, BaseException):
            return after, "the result"
        assert isinstance(result, grpc.aio.AioRpcError), repr(result)
        return after, _said(from_rpc_error(result), point)

    async def _victims(self, client: Client, point: Point) -> int:
        """The process to kill; returns when it is there."""
        if point.victim == "hypervisor":
            assert self.service.process is not None
            return self.service.process.pid
        name = "new" if point.action in NEW else "subject"
        async for _ in client.hypervisor.WatchBoxes(pb.WatchBoxesRequest(), timeout=_SECONDS):
            with contextlib.suppress(OSError, VoidboxError):
                shim = record.load(self.service.layout.box(name)).shim_pid
                if shim:
                    machines = children(shim)
                    return machines[0] if point.victim == "machine" and machines else shim
        raise AssertionError("the watch has ended")

    async def _settle(self, client: Client) -> None:
        """See that what is there is whole, and remove it."""
        for box in (await client.hypervisor.ListBoxes(pb.ListBoxesRequest())).boxes:
            if box.state == pb.BOX_STATE_RUNNING and box.id != "witness":
                await self._check(client, box.id)
            elif box.state == pb.BOX_STATE_FAILED:
                assert box.reason, box
            else:
                assert box.state != pb.BOX_STATE_STARTING, box
        for snapshot in (await client.hypervisor.ListSnapshots(pb.ListSnapshotsRequest())).snapshots:
            if snapshot.name != "base":
                request = pb.CreateBoxRequest(box_id="check", config=pb.BoxConfig(snapshot=snapshot.name))
                await client.hypervisor.CreateBox(request, timeout=_SECONDS)
        await self._clean(client)
        await self._rest(client)

    async def _check(self, client: Client, box_id: str) -> None:
        """A box works, or has just died and says so."""
        try:
            ended, _, output = await client.run(box_id, "true")
            assert ended.exit_code == 0, output
        except grpc.aio.AioRpcError as error:
            if from_rpc_error(error).reason != "BOX_DIED":
                raise
        else:
            return
        assert (await client.until(box_id, pb.BOX_STATE_FAILED)).reason

    async def _clean(self, client: Client) -> None:
        for box in (await client.hypervisor.ListBoxes(pb.ListBoxesRequest())).boxes:
            if box.id != "witness":
                await client.delete(box.id)
        for snapshot in (await client.hypervisor.ListSnapshots(pb.ListSnapshotsRequest())).snapshots:
            if snapshot.name != "base":
                await client.hypervisor.DeleteSnapshot(pb.DeleteSnapshotRequest(name=snapshot.name))

    async def _rest(self, client: Client) -> None:
        """Return once all is made ahead that the service makes ahead."""
        kinds = {"pool", "ready"} if self._pool else {"ready"}
        await all_wait(client, self.service.layout.machines, self.service.log, kinds)

    async def _count(self, before: Census | None) -> Census:
        assert self.service.process is not None
        services = {"hypervisor": self.service.process.pid}
        return await census.settled(self.service.directory, services, before)

    async def _compare(self) -> None:
        assert self._before is not None
        now = await self._count(self._before)
        left = census.grown(self._before, now)
        assert not left, f"left over (before, after): {left}\n{self._before.opened}\n{now.opened}"


def _said(error: VoidboxError, point: Point) -> str:
    """The error as the caller reads it, if it is one that a caller can act on."""
    if point.victim == "hypervisor":
        assert isinstance(error, Unavailable), error
    else:
        assert isinstance(error, VoidboxError)
        assert error.reason != error.default_reason, f"{type(error).__name__}: {error.message}"
    return f"{error.reason}: {error.message.splitlines()[0][:160]}"


async def measure(
    seed: int,
    count: int,
    tell: Callable[[str], None],
    *,
    victims: tuple[Victim, ...] = VICTIMS,
    pool: bool = True,
) -> Outcome:
    """All turns on one service, which leaves nothing behind in the end."""
    tell(f"seed {seed}")
    outcome = Outcome(seed)
    chosen = points(seed, count, victims)
    with HypervisorProcess(flags=["--pool-size", str(int(pool)), "--ready-size", "1"]) as service:
        stage = Stage(service, pool=pool)
        await stage.connect()
        await stage.prepare({point.action for point in chosen})
        for number, point in enumerate(chosen):
            after, said = await stage.turn(point)
            outcome.rows.append((point, after, said))
            tell(f"{number + 1} of {len(chosen)}: {point}: {said}")
        await stage.close()
    return outcome
