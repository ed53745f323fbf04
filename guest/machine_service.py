"""The calls about the machine itself: Claim, GetGuest, Mount, Telemetry, Shutdown."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from guest import identity, log
from guest.control import SpawnFailed
from guest.errors import AgentError, Code, not_implemented, wrong_state
from guest.guest_state import VERSION, Guest
from guest.identity import Identity
from guest.rpc import Gate, call
from voidbox.guest.v1 import guest_pb2 as pb

_GRACE = 2.0  # guest.proto: ShutdownRequest.grace
_INTERVAL, _SHORTEST_INTERVAL = 1.0, 0.1  # guest.proto: TelemetryRequest.interval


class MachineCalls:
    """Translates between protobuf and the machine."""

    gate: Gate
    guest: Guest
    stopping: asyncio.Event
    claiming: asyncio.Lock

    @call(before_claim=True)
    async def Claim(self, request: pb.ClaimRequest, _context: Any) -> pb.ClaimResponse:
        """Give the box its identity; again only with the secret in force."""
        wanted = _to_identity(request)
        wanted.validate()
        async with self.claiming:
            if self.gate.claimed and not self.gate.matches(((_SECRET, wanted.secret),)):
                raise wrong_state("the box has been claimed already", reason="CLAIMED")
            # Not stopped half-way by a caller that goes away.
            done = await asyncio.shield(asyncio.ensure_future(self._claim(wanted)))
        log.info(f"claimed as {wanted.box_id!r}")
        return pb.ClaimResponse(
            hostname_set=done.hostname,
            machine_id_set=done.machine_id,
            clock_set=done.clock,
            entropy_added=done.entropy,
            root_disk_mounted=done.disk,
            boot_id=boot_id(),
            agent_version=VERSION,
        )

    async def _claim(self, wanted: Identity) -> identity.Confirmation:
        again = self.gate.claimed
        guest = self.guest
        current = guest.root if again else None
        done, root = await asyncio.to_thread(identity.apply, wanted, guest.settings, current)
        guest.set_root(root)
        guest.uid, guest.gid = wanted.uid, wanted.gid
        guest.groups = tuple(sorted({wanted.gid, *wanted.groups}))
        guest.env, guest.box_id = wanted.env, wanted.box_id
        if guest.settings.guest and not again:
            try:
                await guest.control.request(
                    {"op": "namespace", "root": "" if root.path == "/" else root.path}
                )
            except SpawnFailed as failure:
                raise AgentError(
                    Code.INTERNAL, "NO_NAMESPACE", f"cannot make the programs' root: {failure}"
                ) from failure
        self.gate.secret = wanted.secret
        guest.save(wanted.secret)
        return done

    @call(before_claim=True)
    async def GetGuest(self, _request: pb.GetGuestRequest, _context: Any) -> pb.GetGuestResponse:
        """Describe the guest."""
        answer = pb.GetGuestResponse(
            boot_id=boot_id(),
            kernel_release=os.uname().release,
            agent_version=VERSION,
            claimed=self.gate.claimed,
        )
        answer.uptime.FromNanoseconds(time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        return answer

    @call()
    async def ConfigureNetwork(self, _request: pb.ConfigureNetworkRequest, _context: Any) -> None:
        """Not in this version."""
        raise not_implemented("ConfigureNetwork")

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


_SECRET = "voidbox-secret-bin"  # noqa: S105 - the name of the metadata key


def boot_id() -> str:
    """The kernel's boot id."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


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
