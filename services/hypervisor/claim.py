"""The first conversation with a fresh guest: it gets its identity, and must confirm each item."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from google.protobuf import duration_pb2, timestamp_pb2

from services.common.address import Address
from services.common.channel import open_channel
from services.common.errors import Internal, TimedOut, from_rpc_error
from services.hypervisor.egress import link
from services.hypervisor.model import Confinement, MountMode
from voidbox.common.v1 import common_pb2
from voidbox.guest.v1 import guest_pb2, guest_pb2_grpc

if TYPE_CHECKING:  # exists in the type stubs only
    from voidbox.guest.v1.guest_pb2_grpc import GuestServiceAsyncStub

log = logging.getLogger(__name__)

SECRET_KEY = "voidbox-secret-bin"  # noqa: S105 - the metadata key
SECRET_BYTES = 32
REHEARSAL = "rehearsal"
ENTROPY_BYTES = 64
# A mount inside a guest under emulation takes well below a second.
MOUNT_SECONDS = 30.0
# Longer than the guest itself waits for its programs, and for a device that was plugged in again.
FREEZE_SECONDS = 40.0
# One system call; a guest under emulation on a busy host that has just been woken answers late.
CLOCK_SECONDS = 10.0
# Memory in use is reclaimed first, which may write much to the box's disk.
LIMITS_SECONDS = 60.0
# Longer than the guest waits for the device.
NETWORK_SECONDS = 40.0

# The socket stands before the guest runs, so a connection is accepted and then waits for the
# guest's driver; it is refused while the driver is up and the agent not yet, then tried again.
# The first number is how long one attempt may take, the others bound the pause between two.
_BOOT_OPTIONS = (
    ("grpc.min_reconnect_backoff_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
    # A guest that stands still (paused, a busy host) must not lose its streams.
    ("grpc.keepalive_time_ms", 2**31 - 1),
    ("grpc.enable_retries", 0),
)
_MODES = {
    MountMode.READ_ONLY: common_pb2.MOUNT_MODE_READ_ONLY,
    MountMode.READ_WRITE: common_pb2.MOUNT_MODE_READ_WRITE,
    # The host's side is the overlay; what the guest mounts may simply be written.
    MountMode.OVERLAY: common_pb2.MOUNT_MODE_READ_WRITE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a guest is told to be; `user` is (uid, gid) of its programs, None for the agent's default."""

    secret: bytes = field(repr=False, default_factory=lambda: secrets.token_bytes(SECRET_BYTES))
    box_id: str
    hostname: str
    user: tuple[int, int] | None = None
    root_serial: str = ""
    root_writable: bool = False
    confinement: Confinement = field(default_factory=Confinement)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """What a claimed guest told."""

    boot_id: str
    agent_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """A device for the guest to mount: the mount tag of a share or the serial of a disk.

    `file` is set if the share holds one file of that name, to be mounted by itself.
    """

    source: str
    path: str
    mode: MountMode
    disk: bool = False
    file: str = ""


def guest_channel(directory_fd: int, name: str) -> grpc.aio.Channel:
    """A channel to the socket `name` in an open directory, however long the directory's path is."""
    return open_channel(Address(path=Path(f"/proc/self/fd/{directory_fd}/{name}")), options=_BOOT_OPTIONS)


class Guest:
    """The agent of one box, as the hypervisor calls it."""

    def __init__(self, channel: grpc.aio.Channel, secret: bytes) -> None:
        self.channel = channel
        self.metadata = ((SECRET_KEY, secret),)
        self.stub: GuestServiceAsyncStub = guest_pb2_grpc.GuestServiceStub(channel)  # type: ignore[assignment]

    async def claim(self, identity: Identity, seconds: float, former: bytes = b"") -> Claimed:
        """Give the guest its identity; waits for the agent to come up.

        Args:
            identity: Who it shall be.
            seconds: How long that may take.
            former: The secret in force, if the guest has been somebody before.

        Raises:
            Internal: the guest does not confirm an item; it must not be served.
            TimedOut: no answer within `seconds`.
        """
        answer = await self._claim(identity, seconds, former, rehearsal=False)
        confirmed = {
            "host name": answer.hostname_set,
            "machine id": answer.machine_id_set,
            "clock": answer.clock_set,
            "entropy": answer.entropy_added,
            "root disk": answer.root_disk_mounted,
            "boot id": bool(answer.boot_id),
            "confinement": answer.confined or identity.confinement == Confinement(),
        }
        if missing := [name for name, done in confirmed.items() if not done]:
            raise Internal(
                f"box {identity.box_id}: the guest did not confirm {', '.join(missing)}; it is not served",
                reason="CLAIM_UNCONFIRMED",
                box=identity.box_id,
            )
        return Claimed(boot_id=answer.boot_id, agent_version=answer.agent_version)

    async def rehearse(self, seconds: float, former: bytes = b"") -> None:
        """Claim the guest as nobody in particular and run a program, so that both go faster later.

        The code is then loaded and, under emulation, translated. The guest holds nothing but `secret`
        of this; the next claim has to name it as the former one.

        Raises:
            VoidboxError: it cannot be claimed.
        """
        identity = Identity(secret=self.metadata[0][1], box_id="rehearsal", hostname="voidbox")
        deadline = time.monotonic() + seconds
        await self._claim(identity, seconds, former, rehearsal=True)
        try:
            async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                await self._run_true()
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            # A guest image need not have such a program.
            log.info("the rehearsal in a guest ended early: %r", error)

    async def _run_true(self) -> None:
        call = self.stub.Exec(metadata=self.metadata)
        await call.write(guest_pb2.ExecRequest(start=guest_pb2.ExecStart(exec_id=REHEARSAL, program="true")))
        await call.done_writing()
        async for _ in call:
            pass
        await self.stub.DeleteExec(
            guest_pb2.DeleteExecRequest(exec_id=REHEARSAL), metadata=self.metadata, timeout=MOUNT_SECONDS
        )

    async def _claim(
        self, identity: Identity, seconds: float, former: bytes, *, rehearsal: bool
    ) -> guest_pb2.ClaimResponse:
        begin = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                await self.channel.channel_ready()
        except TimeoutError as error:
            raise TimedOut(
                f"box {identity.box_id}: the agent did not answer within {seconds:g} s",
                reason="BOOT_TIMEOUT",
                box=identity.box_id,
            ) from error
        # Taken only now: a clock from before the boot would be late by the boot's length.
        now = time.time_ns()
        request = guest_pb2.ClaimRequest(
            secret=identity.secret,
            box_id=identity.box_id,
            hostname=identity.hostname,
            machine_id=os.urandom(16),
            wall_clock=timestamp_pb2.Timestamp(seconds=now // 10**9, nanos=now % 10**9),
            entropy=os.urandom(ENTROPY_BYTES),
            env=dict(identity.env),
            rehearsal=rehearsal,
        )
        request.confinement.limits.CopyFrom(_limits(identity.confinement))
        request.confinement.allowed_programs.extend(identity.confinement.allowed_programs)
        if identity.user is not None:
            request.default_user.uid, request.default_user.gid = identity.user
        if identity.root_serial:
            request.root_disk.serial = identity.root_serial
            request.root_disk.writable = identity.root_writable
        try:
            return await self.stub.Claim(
                request,
                timeout=max(0.1, seconds - (time.monotonic() - begin)),
                wait_for_ready=True,
                metadata=((SECRET_KEY, former),) if former else self.metadata,
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def mount(self, attachment: Attachment) -> None:
        """Have the guest mount a share or disk.

        Raises:
            VoidboxError: as the guest says.
        """
        request = guest_pb2.MountRequest(
            source=attachment.source,
            type=guest_pb2.MOUNT_TYPE_DISK if attachment.disk else guest_pb2.MOUNT_TYPE_9P,
            path=attachment.path,
            mode=_MODES[attachment.mode],
            file=attachment.file,
        )
        try:
            await self.stub.Mount(request, timeout=MOUNT_SECONDS, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def configure_network(self, certificates: bytes = b"") -> None:
        """Have the guest set up the network device that it has, or is about to be given.

        Args:
            certificates: PEM certificates that its programs shall trust; empty: no others than before.

        Raises:
            VoidboxError: as the guest says.
        """
        request = guest_pb2.ConfigureNetworkRequest(
            mac_address=link.GUEST_MAC,
            address=str(link.GUEST),
            gateway=str(link.GATEWAY.ip),
            name_servers=[str(link.NAME_SERVER)],
            trusted_certificates=certificates,
            address6=str(link.GUEST6),
            gateway6=str(link.GATEWAY6.ip),
        )
        try:
            await self.stub.ConfigureNetwork(
                request, timeout=NETWORK_SECONDS, wait_for_ready=True, metadata=self.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def freeze(self, frozen: bool) -> None:
        """Have all programs stand still, or go on.

        Raises:
            VoidboxError: as the guest says.
        """
        request = guest_pb2.FreezeProgramsRequest(frozen=frozen)
        try:
            await self.stub.FreezePrograms(
                request, timeout=FREEZE_SECONDS, wait_for_ready=True, metadata=self.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def set_clock(self) -> None:
        """Tell the guest what time it is; its clock stood still with its processors.

        Raises:
            VoidboxError: it does not answer.
        """
        now = time.time_ns()
        request = guest_pb2.SetClockRequest(
            wall_clock=timestamp_pb2.Timestamp(seconds=now // 10**9, nanos=now % 10**9)
        )
        try:
            await self.stub.SetClock(
                request, timeout=CLOCK_SECONDS, wait_for_ready=True, metadata=self.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def update_limits(self, confinement: Confinement) -> None:
        """Change what the guest's programs may take; limits that are 0 stay as they are.

        Raises:
            VoidboxError: as the guest says.
        """
        request = guest_pb2.UpdateLimitsRequest(limits=_limits(confinement))
        try:
            await self.stub.UpdateLimits(request, timeout=LIMITS_SECONDS, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def boot_id(self, seconds: float) -> str:
        """The guest's boot id, if it knows our secret.

        Raises:
            VoidboxError: it does not answer in time, or not to us.
        """
        try:
            answer = await self.stub.GetGuest(
                guest_pb2.GetGuestRequest(), timeout=seconds, wait_for_ready=True, metadata=self.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return answer.boot_id

    async def shut_down(self, grace: float) -> None:
        """Ask the guest to power off, its programs having `grace` seconds.

        Raises:
            VoidboxError: it does not answer.
        """
        request = guest_pb2.ShutdownRequest(
            grace=duration_pb2.Duration(seconds=int(grace), nanos=int(grace % 1 * 1e9))
        )
        try:
            await self.stub.Shutdown(request, timeout=grace + 1, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


def _limits(given: Confinement) -> common_pb2.Limits:
    return common_pb2.Limits(
        memory_bytes=given.memory_bytes,
        processes=given.processes,
        cpu_millis=given.cpu_millis,
        open_files=given.open_files,
        file_size_bytes=given.file_size_bytes,
    )
