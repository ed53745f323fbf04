"""The calls about the machine itself: Claim, GetGuest, Mount, Telemetry, Shutdown."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from guest import boot, identity, log
from guest.control import SpawnFailed
from guest.errors import AgentError, Code, invalid, wrong_state
from guest.guest_state import VERSION, Guest
from guest.identity import Identity
from guest.limits import Confinement, unlimited
from guest.mounts import Mounts
from guest.rpc import CHUNK_LIMIT, SECRET_KEY, Gate, call
from voidbox.common.v1 import common_pb2
from voidbox.guest.v1 import guest_pb2 as pb

if TYPE_CHECKING:
    from guest.telemetry import Sample

_GRACE = 2.0  # guest.proto: ShutdownRequest.grace
_INTERVAL, _SHORTEST_INTERVAL = 1.0, 0.1  # guest.proto: TelemetryRequest.interval


class MachineCalls:
    """Translates between protobuf and the machine."""

    gate: Gate
    guest: Guest
    stopping: asyncio.Event
    claiming: asyncio.Lock
    mounts: Mounts

    @call(always=True)
    async def Claim(self, request: pb.ClaimRequest, context: Any) -> pb.ClaimResponse:
        """Give the box its identity; again only with the secret in force."""
        wanted = _to_identity(request)
        wanted.validate()
        same = ((SECRET_KEY, wanted.secret),)
        confinement = _to_confinement(request.confinement)
        confinement.validate()
        async with self.claiming:
            if (
                self.gate.claimed
                and not self.gate.matches(same)
                and not self.gate.matches(context.invocation_metadata())
            ):
                raise wrong_state("the box has been claimed already", reason="CLAIMED")
            # Not stopped half-way by a caller that goes away.
            done = await asyncio.shield(asyncio.ensure_future(self._claim(wanted, confinement)))
        if request.rehearsal:
            # It is in the saved memory then: each machine restored from it tells the host what it has freed.
            await asyncio.to_thread(boot.load_lazy, self.guest.settings, "balloon")
        log.info(f"claimed as {wanted.box_id!r}")
        return pb.ClaimResponse(
            hostname_set=done.hostname,
            machine_id_set=done.machine_id,
            clock_set=done.clock,
            entropy_added=done.entropy,
            root_disk_mounted=done.disk,
            boot_id="" if request.rehearsal else boot_id(),
            agent_version=VERSION,
            confined=True,
        )

    async def _claim(self, wanted: Identity, confinement: Confinement) -> identity.Confirmation:
        guest = self.guest
        current = guest.root if self.gate.claimed else None
        done, root = await asyncio.to_thread(identity.apply, wanted, guest.settings, current)
        guest.set_root(root)
        guest.uid, guest.gid = wanted.uid, wanted.gid
        guest.groups = tuple(sorted({wanted.gid, *wanted.groups}))
        guest.env, guest.box_id = wanted.env, wanted.box_id
        if guest.settings.guest and root is not current:
            try:
                await guest.control.request(
                    {"op": "namespace", "root": "" if root.path == "/" else root.path}
                )
            except SpawnFailed as failure:
                raise AgentError(
                    Code.INTERNAL, "NO_NAMESPACE", f"cannot make the programs' root: {failure}"
                ) from failure
        try:
            await guest.control.request({"op": "limit", "files": confinement.for_group()})
        except SpawnFailed as failure:
            raise unlimited(failure) from failure
        guest.execs.confinement = confinement
        self.gate.secret = wanted.secret
        guest.save(wanted.secret)
        return done

    @call()
    async def FreezePrograms(
        self, request: pb.FreezeProgramsRequest, _context: Any
    ) -> pb.FreezeProgramsResponse:
        """Stop all programs, or let them go on."""
        from guest.freezer import set_frozen

        await asyncio.to_thread(set_frozen, self.guest.settings.cgroup, request.frozen)
        return pb.FreezeProgramsResponse()

    @call()
    async def SetClock(self, request: pb.SetClockRequest, _context: Any) -> pb.SetClockResponse:
        """Set the wall clock."""
        wanted = request.wall_clock.ToNanoseconds()
        if not 0 < wanted < 1 << 63:
            raise invalid("wall_clock is missing or out of range")
        time.clock_settime_ns(time.CLOCK_REALTIME, wanted)
        return pb.SetClockResponse()

    @call()
    async def UpdateLimits(self, request: pb.UpdateLimitsRequest, _context: Any) -> pb.UpdateLimitsResponse:
        """Change what all programs together may take."""
        from guest.memory_room import make_room

        guest = self.guest
        async with self.claiming:
            new = _to_confinement(common_pb2.Confinement(limits=request.limits))
            wanted = guest.execs.confinement.changed(new)
            wanted.validate()
            if wanted.memory < (guest.execs.confinement.memory or sys.maxsize):
                await asyncio.to_thread(make_room, guest.settings.cgroup, wanted.memory)
            try:
                await guest.control.request({"op": "limit", "files": wanted.for_group()})
            except SpawnFailed as failure:
                raise unlimited(failure) from failure
            guest.execs.confinement = wanted
            guest.save(self.gate.secret)
        return pb.UpdateLimitsResponse()

    @call(before_claim=True)
    async def GetGuest(self, _request: pb.GetGuestRequest, _context: Any) -> pb.GetGuestResponse:
        """Describe the guest."""
        answer = pb.GetGuestResponse(
            # The kernel makes it up when it is first read; machines restored from this one shall differ.
            boot_id=boot_id() if self.gate.claimed else "",
            kernel_release=os.uname().release,
            agent_version=VERSION,
            claimed=self.gate.claimed,
        )
        answer.uptime.FromNanoseconds(time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        return answer

    @call()
    async def Mount(self, request: pb.MountRequest, _context: Any) -> pb.MountResponse:
        """Mount an attached device."""
        guest = self.guest
        await asyncio.to_thread(
            self.mounts.mount,
            guest.root, request.source, request.type, request.path, request.mode, (guest.uid, guest.gid),
            request.file,
        )  # fmt: skip
        return pb.MountResponse()

    @call()
    async def Unmount(self, request: pb.UnmountRequest, _context: Any) -> pb.UnmountResponse:
        """Unmount what Mount mounted."""
        await asyncio.to_thread(self.mounts.unmount, self.guest.root, request.path)
        return pb.UnmountResponse()

    @call()
    async def Connect(self, requests: AsyncIterator[pb.ConnectRequest], context: Any) -> None:
        """Tunnel one connection to the guest's loopback."""
        from guest.tunnel import tunnel

        first = await anext(aiter(requests), None)
        if first is None or not first.HasField("open"):
            raise invalid("the first message of Connect is `open`", reason="NO_OPEN")

        async def incoming() -> AsyncIterator[bytes]:
            async for request in requests:
                if not request.HasField("data") or len(request.data) > CHUNK_LIMIT:
                    raise invalid(
                        f"after `open` come `data` of at most {CHUNK_LIMIT} bytes", reason="BAD_DATA"
                    )
                yield request.data

        await tunnel(first.open.port, incoming(), lambda data: context.write(pb.ConnectResponse(data=data)))

    @call()
    async def Telemetry(self, request: pb.TelemetryRequest, context: Any) -> None:
        """Stream measurements until the caller cancels."""
        interval = _INTERVAL
        if request.HasField("interval"):
            interval = request.interval.seconds + request.interval.nanos / 1e9
        if interval < _SHORTEST_INTERVAL:
            raise invalid(f"an interval of {interval:g} s; the shortest is {_SHORTEST_INTERVAL:g} s")
        from guest import telemetry

        loop = asyncio.get_running_loop()
        agents = (os.getppid(), os.getpid())
        start = loop.time()
        sequence = 0
        while True:
            measured = await asyncio.to_thread(telemetry.sample, agents=agents, each=request.processes)
            await context.write(_to_telemetry(sequence, measured))
            sequence += 1
            # On the grid of the interval: a slow reader gets fewer, not later ones.
            passed = loop.time() - start
            await asyncio.sleep(interval - passed % interval)

    @call()
    async def ConfigureNetwork(
        self, request: pb.ConfigureNetworkRequest, _context: Any
    ) -> pb.ConfigureNetworkResponse:
        """Set the network device up."""
        from guest.network import Wanted, configure

        boot.load_lazy(self.guest.settings, "net")
        wanted = Wanted(
            request.mac_address,
            request.address,
            request.gateway,
            tuple(request.name_servers),
            request.address6,
            request.gateway6,
        )
        await asyncio.to_thread(configure, wanted, self.guest.root)
        if request.trusted_certificates:
            from guest import certificates

            await asyncio.to_thread(certificates.install, request.trusted_certificates, self.guest.root)
        return pb.ConfigureNetworkResponse()

    @call()
    async def Shutdown(self, request: pb.ShutdownRequest, _context: Any) -> pb.ShutdownResponse:
        """End all programs and flush the disks; the power goes once this has been answered."""
        grace = _GRACE
        if request.HasField("grace"):
            grace = request.grace.seconds + request.grace.nanos / 1e9
        self.guest.execs.closed = True
        await self.guest.control.request({"op": "stop", "grace": max(0.0, min(grace, 60.0))})
        self.stopping.set()
        return pb.ShutdownResponse()


def boot_id() -> str:
    """The kernel's boot id."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _to_telemetry(sequence: int, measured: Sample) -> pb.TelemetryResponse:
    message = pb.TelemetryResponse(
        sequence=sequence,
        memory_total_bytes=measured.memory_total,
        memory_available_bytes=measured.memory_available,
        network_received_bytes=measured.received,
        network_sent_bytes=measured.sent,
        disk_read_bytes=measured.read,
        disk_written_bytes=measured.written,
        process_count=measured.process_count,
        agent_memory_bytes=measured.agent_memory,
    )
    message.time.FromNanoseconds(time.time_ns())
    message.cpu_time.FromNanoseconds(measured.cpu_ns)
    for process in measured.processes:
        usage = message.processes.add(
            pid=process.pid,
            name=process.name,
            memory_bytes=process.memory,
            exec_id=process.exec_id,
        )
        usage.cpu_time.FromNanoseconds(process.cpu_ns)
    return message


def _to_confinement(message: common_pb2.Confinement) -> Confinement:
    limits = message.limits
    return Confinement(
        memory=limits.memory_bytes,
        processes=limits.processes,
        cpu_millis=limits.cpu_millis,
        open_files=limits.open_files,
        file_size=limits.file_size_bytes,
        allowed=list(message.allowed_programs) or None,
    )


def _to_identity(request: pb.ClaimRequest) -> Identity:
    user = request.default_user
    named = request.HasField("default_user")
    return Identity(
        secret=request.secret,
        box_id=request.box_id,
        hostname=request.hostname,
        machine_id=request.machine_id,
        wall_clock_ns=request.wall_clock.seconds * 10**9 + request.wall_clock.nanos,
        entropy=request.entropy,
        uid=user.uid if named else 1000,
        gid=user.gid if named else 1000,
        groups=tuple(user.groups),
        disk=request.root_disk.serial,
        disk_writable=request.root_disk.writable,
        env=dict(request.env),
    )
