"""The services behind this one, as the engine's effects see them: imager, hypervisor, guests.

Calls that fail because the peer cannot be reached are repeated with backoff for a stated
time, so a service that is being restarted is not noticed by the runs. What the peer
itself answers is never repeated here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from services.common.egress.wire import to_message
from services.common.errors import (
    Cancelled,
    Internal,
    NotFound,
    TimedOut,
    Unavailable,
    VoidboxError,
    from_rpc_error,
)
from services.orchestrator.blobs import BlobWriter, reading
from services.orchestrator.convert import duration, mount_to_proto
from services.orchestrator.plan import Machine
from services.orchestrator.records import Progress
from voidbox import stubs
from voidbox.common.v1 import common_pb2
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2
from voidbox.imager.v1 import imager_pb2
from voidbox.spec.models import PullPolicy, Volume

_T = TypeVar("_T")

BOX_ID_KEY: Final = "voidbox-box-id"

# A service of the local stack is back within a few seconds after it has died.
PATIENCE_SECONDS: Final = 20.0
# A guest image may have to be pulled first.
_RESOLVE_SECONDS: Final = 900.0
# A large image over a slow line.
_DISK_SECONDS: Final = 3600.0
_POLICIES: Final = {
    PullPolicy.ALWAYS: imager_pb2.PULL_POLICY_ALWAYS,
    PullPolicy.MISSING: imager_pb2.PULL_POLICY_MISSING,
    PullPolicy.NEVER: imager_pb2.PULL_POLICY_NEVER,
}
# The guest's own limit, and room for the hypervisor to report that it has passed.
_START_SECONDS: Final = 120.0
_CREATE_SECONDS: Final = _START_SECONDS + 30.0
# The hypervisor's ladder from asking to killing is shorter.
_DELETE_SECONDS: Final = 30.0
_SHORT_SECONDS: Final = 15.0
# A gigabyte through vsock under emulation.
_TRANSFER_SECONDS: Final = 900.0

# Between two attempts to watch a box.
_WATCH_SECONDS: Final = 0.2
# Formatting a volume writes the file system's tables only.
_VOLUME_SECONDS: Final = 150.0

_ENDED = frozenset({hypervisor_pb2.BOX_STATE_STOPPED, hypervisor_pb2.BOX_STATE_FAILED})


class BoxLost(Unavailable):
    """The box has ended by itself; the message names what died."""

    default_reason = "BOX_LOST"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """What a box boots: absolute paths on the hypervisor's host."""

    kernel: str
    initramfs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RootDisk:
    """The disk made of an image: absolute path on the hypervisor's host."""

    path: str
    digest: str
    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxInfo:
    """A box as the hypervisor describes it."""

    id: str
    running: bool
    ended: bool
    reason: str
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How a peer is."""

    name: str
    address: str
    reachable: bool
    detail: str


def is_unreachable(error: BaseException) -> bool:
    """Whether `error` says that nobody answered, rather than what somebody answered.

    A call that was made just when its peer went away may be told of that by its time limit only.
    """
    return isinstance(error, (Unavailable, TimedOut)) and error.reason == type(error).default_reason


def is_broken(error: BaseException) -> bool:
    """Whether `error` may only mean that a stream broke on the way, so it can be taken up again."""
    if isinstance(error, (Cancelled, Internal)):
        return error.reason == type(error).default_reason
    return is_unreachable(error)


async def patiently(peer: str, call: Callable[[], Awaitable[_T]], seconds: float = PATIENCE_SECONDS) -> _T:
    """`call()`, again and again while `peer` cannot be reached, for `seconds` at most.

    Raises:
        Unavailable: it could not be reached in that time (reason `PEER_UNREACHABLE`).
    """
    attempts = AsyncRetrying(
        retry=retry_if_exception(is_unreachable),
        wait=wait_random_exponential(multiplier=0.05, max=1),
        stop=stop_after_delay(seconds),
        reraise=True,
    )
    try:
        async for attempt in attempts:
            with attempt:
                return await call()
    except (Unavailable, TimedOut) as error:
        if not is_unreachable(error):
            raise
        message = f"the {peer} has not answered for {seconds:g} s: {error.message}; see: voidbox status"
        raise Unavailable(message, reason="PEER_UNREACHABLE", peer=peer) from error
    raise AssertionError("tenacity ended without a result")


async def _unary(call: Awaitable[_T]) -> _T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


async def _messages(call: Any) -> AsyncIterator[Any]:
    try:
        async for message in call:
            yield message
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    finally:
        call.cancel()


class Peers:
    """The imager and the hypervisor of one host.

    Args:
        hypervisor: Channel to the hypervisor, which also carries the calls of guests.
        imager: Channel to the imager.
        addresses: Where they are, for messages.
        patience: Seconds that an unreachable peer is waited for.
    """

    def __init__(
        self,
        hypervisor: grpc.aio.Channel,
        imager: grpc.aio.Channel,
        addresses: Mapping[str, str],
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.hypervisor_channel, self.imager_channel = hypervisor, imager
        self.patience = patience
        self._addresses = addresses
        self._hypervisor = stubs.hypervisor(hypervisor)
        self._imager = stubs.imager(imager)

    async def resolve_guest_image(self, machine: Machine) -> GuestImage:
        """The kernel and initramfs that `machine` boots."""
        request = imager_pb2.ResolveGuestImageRequest(
            kernel_path=machine.kernel,
            initramfs_path=machine.initramfs,
            guest_image=machine.guest_image,
            policy=_POLICIES[machine.pull_policy],
        )

        async def call() -> GuestImage:
            response = await _unary(self._imager.ResolveGuestImage(request, timeout=_RESOLVE_SECONDS))
            found = response.guest_image
            return GuestImage(kernel=found.kernel_path, initramfs=found.initramfs_path)

        return await patiently("imager", call, self.patience)

    async def build_disk(
        self, machine: Machine, on_progress: Callable[[Progress], Awaitable[None]]
    ) -> RootDisk:
        """The root disk made of the image of `machine`."""
        reference = machine.image

        async def call() -> RootDisk:
            request = imager_pb2.BuildDiskRequest(reference=reference, policy=_POLICIES[machine.pull_policy])
            disk: RootDisk | None = None
            async for response in _messages(self._imager.BuildDisk(request, timeout=_DISK_SECONDS)):
                if response.WhichOneof("result") == "progress":
                    step = response.progress
                    await on_progress(
                        Progress(
                            subject=step.subject,
                            action=step.action,
                            done=step.done,
                            total=step.total,
                            unit=step.unit,
                        )
                    )
                else:
                    made = response.disk
                    disk = RootDisk(path=made.path, digest=made.digest.value, format=made.format)
            if disk is None:
                raise Internal(f"the imager made no disk of {reference!r}", image=reference)
            return disk

        return await patiently("imager", call, self.patience)

    async def create_box(
        self,
        box_id: str,
        machine: Machine,
        image: GuestImage | None,
        disk: RootDisk | None,
        labels: Mapping[str, str],
    ) -> BoxInfo:
        """Start a box, and return once its agent answers. Idempotent by `box_id`.

        Without a guest image it starts from the machine's snapshot, whose resources it has.
        """
        config = hypervisor_pb2.BoxConfig(
            mounts=[mount_to_proto(mount) for mount in machine.mounts],
            env=machine.env,
            labels=labels,
            confinement=_confinement(machine),
        )
        if machine.egress is not None:
            config.egress.CopyFrom(to_message(machine.egress))
        if machine.auto_pause:
            config.auto_pause.seconds = machine.auto_pause
        for volume in machine.volumes:
            await self._make_volume(volume)
            config.disks.add(volume=volume.name, guest_path=volume.guest, writable=True)
        if image is not None:
            config.kernel_path, config.initramfs_path = image.kernel, image.initramfs
            config.resources.memory_mib = machine.memory_mib
            config.resources.vcpus = machine.vcpus
            config.resources.disk_mib = machine.disk_mib
            config.cold_boot = machine.cold_boot
        else:
            config.snapshot = machine.snapshot
        if disk is not None:
            config.root_disk.base_path = disk.path
            config.root_disk.base_digest.value = disk.digest
            config.root_disk.format = disk.format
            config.root_disk.writable = True
        request = hypervisor_pb2.CreateBoxRequest(
            box_id=box_id, config=config, start_timeout=duration(_START_SECONDS)
        )

        async def call() -> BoxInfo:
            response = await _unary(self._hypervisor.CreateBox(request, timeout=_CREATE_SECONDS))
            return _box(response.box)

        return await patiently("hypervisor", call, self.patience)

    async def _make_volume(self, volume: Volume) -> None:
        """Make a volume, if it is not there."""
        request = hypervisor_pb2.CreateVolumeRequest(name=volume.name, size_mib=volume.size_mb or 0)

        async def call() -> None:
            await _unary(self._hypervisor.CreateVolume(request, timeout=_VOLUME_SECONDS))

        await patiently("hypervisor", call, self.patience)

    async def find_box(self, box_id: str) -> BoxInfo | None:
        """The box, or None if the hypervisor knows none of that id."""

        async def call() -> BoxInfo | None:
            request = hypervisor_pb2.GetBoxRequest(box_id=box_id)
            try:
                response = await _unary(self._hypervisor.GetBox(request, timeout=_SHORT_SECONDS))
            except NotFound:
                return None
            return _box(response.box)

        return await patiently("hypervisor", call, self.patience)

    async def watch_box(self, box_id: str) -> BoxLost:
        """Wait until the box has ended by itself, and return what died."""
        while True:
            began = time.monotonic()
            info = await self.find_box(box_id)
            if info is None or info.ended:
                return lost(box_id, info)
            request = hypervisor_pb2.WatchBoxesRequest(box_id=box_id)
            try:
                async for response in _messages(self._hypervisor.WatchBoxes(request)):
                    if response.box.id != box_id:
                        continue
                    info = _box(response.box)
                    if response.deleted or info.ended:
                        return lost(box_id, info)
            except VoidboxError as error:
                if not is_broken(error):
                    raise
            # A stream that ends at once, again and again, must not keep this process busy.
            await asyncio.sleep(max(0.0, _WATCH_SECONDS - (time.monotonic() - began)))

    async def read_egress(
        self, box_id: str, offset: int, *, follow: bool
    ) -> AsyncGenerator[tuple[int, list[bytes]], None]:
        """What the box's gateway decided, from an offset on: batches, each with the offset after it."""
        request = hypervisor_pb2.ReadEgressRequest(box_id=box_id, offset=offset, follow=follow)
        seconds = None if follow else _SHORT_SECONDS
        async for answer in _messages(self._hypervisor.ReadEgress(request, timeout=seconds)):
            yield answer.next_offset, [event.SerializeToString() for event in answer.events]

    async def delete_box(self, box_id: str, seconds: float | None = None) -> None:
        """Kill a box and remove all that is left of it. Idempotent."""

        async def call() -> None:
            request = hypervisor_pb2.DeleteBoxRequest(box_id=box_id, force=True)
            try:
                await _unary(self._hypervisor.DeleteBox(request, timeout=_DELETE_SECONDS))
            except NotFound:
                return

        await patiently("hypervisor", call, self.patience if seconds is None else seconds)

    async def delete_changes(self, labels: Mapping[str, str]) -> None:
        """Throw away what boxes with `labels`, which have ended, have changed in overlays."""
        token = ""
        while True:
            request = hypervisor_pb2.ListChangesRequest(page_size=1000, page_token=token, labels=labels)
            response = await _unary(self._hypervisor.ListChanges(request, timeout=_SHORT_SECONDS))
            for each in response.changes:
                gone = hypervisor_pb2.DeleteChangesRequest(box_id=each.box_id)
                await _unary(self._hypervisor.DeleteChanges(gone, timeout=_DELETE_SECONDS))
            token = response.next_page_token
            if not token:
                return

    async def list_boxes(self, labels: Mapping[str, str]) -> list[tuple[str, dict[str, str]]]:
        """Ids and labels of all boxes that have `labels`."""
        found: list[tuple[str, dict[str, str]]] = []
        token = ""
        while True:
            request = hypervisor_pb2.ListBoxesRequest(page_size=1000, page_token=token, labels=labels)
            response = await _unary(self._hypervisor.ListBoxes(request, timeout=_SHORT_SECONDS))
            found += [(box.id, dict(box.config.labels)) for box in response.boxes]
            token = response.next_page_token
            if not token:
                return found

    def guest(self, box_id: str) -> GuestPeer:
        """The agent in a box."""
        return GuestPeer(self.hypervisor_channel, box_id, self.patience)

    async def health(self, name: str) -> Health:
        """How the hypervisor or the imager is, asked by the standard health service."""
        channel = self.hypervisor_channel if name == "hypervisor" else self.imager_channel
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            response = await _unary(stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0))
        except VoidboxError as error:
            return Health(name=name, address=self._addresses[name], reachable=False, detail=error.message)
        detail = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status).lower()
        return Health(name=name, address=self._addresses[name], reachable=True, detail=detail)


def lost(box_id: str, info: BoxInfo | None) -> BoxLost:
    """The error that says how a box ended."""
    why = (info.reason or "it has ended") if info else "it is gone"
    return BoxLost(f"box {box_id} died: {why}", box_id=box_id)


def _box(box: hypervisor_pb2.Box) -> BoxInfo:
    return BoxInfo(
        id=box.id,
        running=box.state == hypervisor_pb2.BOX_STATE_RUNNING,
        ended=box.state in _ENDED,
        reason=box.reason,
        boot_id=box.boot_id,
    )


class GuestPeer:
    """The agent in one box: its files, and the stubs for programs."""

    def __init__(self, channel: grpc.aio.Channel, box_id: str, patience: float) -> None:
        self.box_id = box_id
        self.stub = stubs.guest(channel)
        self.metadata = ((BOX_ID_KEY, box_id),)
        self.patience = patience

    async def _call(self, call: Callable[[], Awaitable[_T]]) -> _T:
        return await patiently("hypervisor", call, self.patience)

    async def kernel_release(self) -> str:
        """The guest's `uname -r`."""
        request = guest_pb2.GetGuestRequest()

        async def call() -> str:
            answer = self.stub.GetGuest(request, metadata=self.metadata, timeout=_SHORT_SECONDS)
            return (await _unary(answer)).kernel_release

        return await self._call(call)

    async def make_directory(self, path: str) -> None:
        """Make a directory and those above it; an existing one is fine."""
        request = guest_pb2.MakeDirectoryRequest(path=path, make_parents=True)

        async def call() -> None:
            await _unary(self.stub.MakeDirectory(request, metadata=self.metadata, timeout=_SHORT_SECONDS))

        await self._call(call)

    async def write_file(self, path: str, source: Path) -> None:
        """Write the host file `source` to `path` in the box, with the directories above it."""
        header = guest_pb2.WriteFileRequest(header=guest_pb2.WriteFileHeader(path=path, make_parents=True))

        async def requests(chunks: AsyncIterator[bytes]) -> AsyncIterator[guest_pb2.WriteFileRequest]:
            yield header
            async for data in chunks:
                yield guest_pb2.WriteFileRequest(data=data)

        async def call() -> None:
            async with reading(source) as chunks:
                await _unary(
                    self.stub.WriteFile(requests(chunks), metadata=self.metadata, timeout=_TRANSFER_SECONDS)
                )

        await self._call(call)

    async def write_tree(self, path: str, source: Path) -> None:
        """Unpack the host's tar archive `source` into the directory `path` in the box."""
        header = guest_pb2.WriteTreeRequest(header=guest_pb2.WriteTreeHeader(path=path))

        async def requests(chunks: AsyncIterator[bytes]) -> AsyncIterator[guest_pb2.WriteTreeRequest]:
            yield header
            async for data in chunks:
                yield guest_pb2.WriteTreeRequest(data=data)

        async def call() -> None:
            async with reading(source) as chunks:
                await _unary(
                    self.stub.WriteTree(requests(chunks), metadata=self.metadata, timeout=_TRANSFER_SECONDS)
                )

        await self._call(call)

    async def read_file(self, path: str, target: BlobWriter) -> None:
        """Read a file of the box.

        Raises:
            NotFound: it is not there.
        """
        request = guest_pb2.ReadFileRequest(path=path)
        call = self.stub.ReadFile(request, metadata=self.metadata, timeout=_TRANSFER_SECONDS)
        async for response in _messages(call):
            target.write(response.data)

    async def read_tree(self, path: str, target: BlobWriter, limit: int) -> None:
        """Read a file or directory of the box as a tar archive.

        Raises:
            NotFound: it is not there.
        """
        request = guest_pb2.ReadTreeRequest(path=path, max_bytes=limit)
        call = self.stub.ReadTree(request, metadata=self.metadata, timeout=_TRANSFER_SECONDS)
        async for response in _messages(call):
            target.write(response.data)

    async def kill(self, exec_id: str) -> None:
        """End a program's whole process tree. A program that has ended is fine."""
        request = guest_pb2.SignalExecRequest(exec_id=exec_id, signal=0)

        async def call() -> None:
            try:
                await _unary(self.stub.SignalExec(request, metadata=self.metadata, timeout=_SHORT_SECONDS))
            except NotFound:
                return

        await self._call(call)

    async def forget(self, exec_id: str) -> None:
        """Let the agent forget a program that has ended, and its output."""
        request = guest_pb2.DeleteExecRequest(exec_id=exec_id)

        async def call() -> None:
            try:
                await _unary(self.stub.DeleteExec(request, metadata=self.metadata, timeout=_SHORT_SECONDS))
            except NotFound:
                return

        await self._call(call)


def _confinement(machine: Machine) -> common_pb2.Confinement:
    limits = machine.limits
    return common_pb2.Confinement(
        limits=common_pb2.Limits(
            memory_bytes=(limits.memory_mb or 0) << 20,
            processes=limits.processes or 0,
            cpu_millis=(limits.cpu_percent or 0) * 10,
            open_files=limits.open_files or 0,
            file_size_bytes=(limits.file_size_mb or 0) << 20,
        ),
        allowed_programs=machine.allowed_commands,
    )
