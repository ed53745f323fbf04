"""A driver whose machines are gRPC servers in this process; their guests do what a test tells them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.common.errors import NotFound, Unavailable, VoidboxError, WrongState, abort
from services.hypervisor import claim, console, console_ring, layout
from services.hypervisor.driver import Machine, MachinePlan
from services.hypervisor.failure import Remains
from services.hypervisor.model import BoxRecord
from services.hypervisor.saved import Saved
from voidbox.guest.v1 import guest_pb2, guest_pb2_grpc

BOOT_ID = "6f1c9b1e-0000-4000-8000-000000000001"


class FakeGuest(guest_pb2_grpc.GuestServiceServicer):
    """Confirms its claim, unless told otherwise, and echoes what it is tunnelled or asked to run."""

    def __init__(self) -> None:
        self.claims: list[guest_pb2.ClaimRequest] = []
        self.mounts: list[guest_pb2.MountRequest] = []
        self.secrets: list[Any] = []
        self.confirm: dict[str, Any] = {}
        self.on_shutdown: Callable[[], None] = lambda: None
        self.hold = asyncio.Event()
        self.broken: VoidboxError | None = None
        self.frozen: list[bool] = []
        self.clocks: list[int] = []
        self.limits: list[Any] = []

    async def Claim(self, request: guest_pb2.ClaimRequest, context: Any) -> guest_pb2.ClaimResponse:  # noqa: N802
        if not request.rehearsal:
            self.claims.append(request)
        values: dict[str, Any] = {
            "hostname_set": True,
            "machine_id_set": True,
            "clock_set": True,
            "entropy_added": True,
            "root_disk_mounted": True,
            "confined": True,
            "boot_id": BOOT_ID,
        }
        return guest_pb2.ClaimResponse(**(values | self.confirm))

    async def Mount(self, request: guest_pb2.MountRequest, context: Any) -> guest_pb2.MountResponse:  # noqa: N802
        self.mounts.append(request)
        return guest_pb2.MountResponse()

    async def GetGuest(self, request: Any, context: Any) -> guest_pb2.GetGuestResponse:  # noqa: N802
        if self.broken is not None:
            await abort(context, self.broken)
        self.secrets.append(dict(context.invocation_metadata()).get(claim.SECRET_KEY))
        return guest_pb2.GetGuestResponse(boot_id=BOOT_ID, claimed=True)

    async def Exec(self, requests: Any, context: Any) -> AsyncIterator[guest_pb2.ExecResponse]:  # noqa: N802
        async for request in requests:
            if request.start.exec_id == claim.REHEARSAL:
                return
            yield guest_pb2.ExecResponse(event=guest_pb2.ExecEvent(started=guest_pb2.ExecStarted(pid=1)))
        await self.hold.wait()

    async def Connect(self, requests: Any, context: Any) -> AsyncIterator[guest_pb2.ConnectResponse]:  # noqa: N802
        async for request in requests:
            yield guest_pb2.ConnectResponse(data=request.data)

    async def DeleteExec(self, request: Any, context: Any) -> guest_pb2.DeleteExecResponse:  # noqa: N802
        return guest_pb2.DeleteExecResponse()

    async def FreezePrograms(self, request: Any, context: Any) -> guest_pb2.FreezeProgramsResponse:  # noqa: N802
        self.frozen.append(request.frozen)
        return guest_pb2.FreezeProgramsResponse()

    async def SetClock(self, request: Any, context: Any) -> guest_pb2.SetClockResponse:  # noqa: N802
        self.clocks.append(request.wall_clock.ToNanoseconds())
        return guest_pb2.SetClockResponse()

    async def UpdateLimits(self, request: Any, context: Any) -> guest_pb2.UpdateLimitsResponse:  # noqa: N802
        self.limits.append(request.limits)
        return guest_pb2.UpdateLimitsResponse()

    async def Shutdown(self, request: Any, context: Any) -> guest_pb2.ShutdownResponse:  # noqa: N802
        asyncio.get_running_loop().call_later(0.01, self.on_shutdown)
        return guest_pb2.ShutdownResponse()


class FakeMachine:
    """A `Machine` that is a server on the guest socket of the box's directory."""

    def __init__(self, directory: Path, guest: FakeGuest) -> None:
        self.ended = asyncio.Event()
        self.vmm_pid = os.getpid()
        self.guest = guest
        self.directory = directory
        self.dies_when_asked = False
        self._end = Remains(recorded=True, exit_code=0)
        self._paused = False
        self.cpu: Callable[[], float] = lambda: 0.0
        self._server = grpc.aio.server()
        guest_pb2_grpc.add_GuestServiceServicer_to_server(guest, self._server)
        checker = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checker, self._server)
        self._health = checker
        self._directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self._socket = f"unix:/proc/self/fd/{self._directory_fd}/{layout.GUEST_SOCKET}"
        guest.on_shutdown = lambda: self.end(Remains(recorded=True, shutdown="guest-shutdown"))

    @property
    def pids(self) -> tuple[int, ...]:
        return (os.getpid(),)

    async def serve(self) -> None:
        self._server.add_insecure_port(self._socket)
        await self._server.start()
        await self._health.set("guest", health_pb2.HealthCheckResponse.NOT_SERVING)

    def guest_channel(self) -> grpc.aio.Channel:
        return claim.guest_channel(self._directory_fd, layout.GUEST_SOCKET)

    async def _asked(self) -> None:
        if self.dies_when_asked:
            self.end(Remains(recorded=True, exit_signal=9))
            await self.ended.wait()
            raise Unavailable("QEMU's monitor: Connection reset by peer", reason="QMP_CLOSED")

    async def pause(self) -> None:
        await self._asked()
        self._paused = True

    async def resume(self) -> None:
        await self._asked()
        self._paused = False

    async def paused(self) -> bool:
        return self._paused

    def moved(self, directory: Path) -> None:
        self.directory = directory

    async def complete(self, plan: MachinePlan) -> None:
        self._paused = False
        plan.note("plug")

    async def plug_nic(self, tap: int, port: int = 0) -> None:
        self.nic = port

    async def capture(self, into: Saved, layers: Path, before: Callable[[], Awaitable[None]]) -> None:
        await before()
        await self._asked()
        for path in self.directory.glob("*.qcow2"):
            (layers / path.name).write_bytes(path.read_bytes())
        await self.save(into)

    async def recover(self) -> None:
        raise AssertionError("machines end with this process")

    async def save(self, into: Saved) -> None:
        os.pwrite(into.devices_fd, b"fake devices", 0)
        os.pwrite(into.memory_fd, b"fake memory", 4096)

    def end(self, remains: Remains) -> None:
        """Die, leaving `remains`."""
        self._end = remains
        self._stopping = asyncio.get_running_loop().create_task(self._stop())

    async def _stop(self) -> None:
        await self._server.stop(None)
        self.ended.set()

    async def kill(self, *, gently: bool) -> None:
        await self._stop()

    def remains(self) -> Remains:
        return self._end

    def cpu_seconds(self) -> float:
        return self.cpu()

    def vsock_bytes(self) -> tuple[int, int]:
        return 11, 22

    async def close(self) -> None:
        if self._directory_fd >= 0:
            fd, self._directory_fd = self._directory_fd, -1
            await self._server.stop(None)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"/proc/self/fd/{fd}/{layout.GUEST_SOCKET}")
            os.close(fd)


class FakeDriver:
    """A `Driver` of `FakeMachine`s; also its own factory."""

    def __init__(self) -> None:
        self.machines: dict[str, FakeMachine] = {}
        self.plans: list[MachinePlan] = []
        self.template_plans: list[MachinePlan] = []
        self.guest = FakeGuest
        self.refuse = False

    def __call__(self, programs: object) -> FakeDriver:
        return self

    async def start(self, plan: MachinePlan, on_spawned: Callable[[int, int], None]) -> Machine:
        if self.refuse:
            raise WrongState("the machine does not start", reason="BOOT_FAILED")
        (self.plans if plan.into is None else self.template_plans).append(plan)
        fd = console.create(plan.directory / layout.CONSOLE_FILE)
        console_ring.Writer(fd).append(b"hello from the console\n")
        os.close(fd)
        machine = FakeMachine(plan.directory, self.guest())  # type: ignore[abstract]
        try:
            on_spawned(0, 0)
            await machine.serve()
        except BaseException:
            await machine.close()
            raise
        plan.note("spawn")
        self.machines[plan.box_id] = machine
        return machine

    async def adopt(self, record: BoxRecord, directory: Path) -> Machine:
        raise NotFound("machines end with this process")

    def leftovers(self, record: BoxRecord, directory: Path) -> Remains:
        return Remains()
