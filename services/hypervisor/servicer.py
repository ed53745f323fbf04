"""HypervisorService: validate, convert, call, convert."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from services.common.errors import InvalidInput, VoidboxError, WrongState
from services.hypervisor import console, convert, convert_changes, convert_egress, layout
from services.hypervisor.box import DEFAULT_STOP_GRACE
from services.hypervisor.capabilities import describe_host
from services.hypervisor.egress import events
from services.hypervisor.probe import Prober
from services.hypervisor.registry import DEFAULT_START_SECONDS, Registry
from services.hypervisor.tunnel import tunnel
from services.hypervisor.update import update
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb
from voidbox.hypervisor.v1 import hypervisor_pb2_grpc

Context = Any


class HypervisorServicer(hypervisor_pb2_grpc.HypervisorServiceServicer):
    """Answers for the boxes of one registry."""

    def __init__(self, registry: Registry, prober: Prober) -> None:
        self._registry = registry
        self._prober = prober

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: Context
    ) -> pb.GetCapabilitiesResponse:
        """Tells what this host can do."""
        return await describe_host(
            self._registry, self._prober, kernel_path=request.kernel_path, refresh=request.refresh
        )

    async def CreateBox(self, request: pb.CreateBoxRequest, context: Context) -> pb.CreateBoxResponse:
        """Starts a box."""
        seconds = DEFAULT_START_SECONDS
        if request.HasField("start_timeout"):
            seconds = convert.seconds(request.start_timeout, "start_timeout")
        config = convert.read_config(request.config)
        return pb.CreateBoxResponse(
            box=convert.box(await self._registry.create(request.box_id, config, seconds))
        )

    async def GetBox(self, request: pb.GetBoxRequest, context: Context) -> pb.GetBoxResponse:
        """Describes a box."""
        return pb.GetBoxResponse(box=convert.box(self._registry.get(request.box_id).record))

    async def ListBoxes(self, request: pb.ListBoxesRequest, context: Context) -> pb.ListBoxesResponse:
        """Lists boxes."""
        records = self._registry.records(request.labels)
        found, token = convert.page(records, request.page_size, request.page_token)
        return pb.ListBoxesResponse(boxes=map(convert.box, found), next_page_token=token)

    async def WatchBoxes(
        self, request: pb.WatchBoxesRequest, context: Context
    ) -> AsyncIterator[pb.WatchBoxesResponse]:
        """Streams changes."""
        async for record, deleted in self._registry.watch(request.box_id):
            yield pb.WatchBoxesResponse(box=convert.box(record), deleted=deleted)

    async def StopBox(self, request: pb.StopBoxRequest, context: Context) -> pb.StopBoxResponse:
        """Ends a box."""
        grace = DEFAULT_STOP_GRACE
        if request.HasField("grace"):
            grace = convert.seconds(request.grace, "grace")
        return pb.StopBoxResponse(box=convert.box(await self._registry.stop(request.box_id, grace)))

    async def DeleteBox(self, request: pb.DeleteBoxRequest, context: Context) -> pb.DeleteBoxResponse:
        """Removes a box."""
        await self._registry.delete(request.box_id, force=request.force)
        return pb.DeleteBoxResponse()

    async def PauseBox(self, request: pb.PauseBoxRequest, context: Context) -> pb.PauseBoxResponse:
        """Stops a box's processors."""
        box = self._registry.get(request.box_id)
        await box.pause()
        return pb.PauseBoxResponse(box=convert.box(box.record))

    async def ResumeBox(self, request: pb.ResumeBoxRequest, context: Context) -> pb.ResumeBoxResponse:
        """Lets a box go on."""
        box = self._registry.get(request.box_id)
        await box.resume()
        return pb.ResumeBoxResponse(box=convert.box(box.record))

    async def GetBoxStats(self, request: pb.GetBoxStatsRequest, context: Context) -> pb.GetBoxStatsResponse:
        """Measures a box."""
        box = self._registry.get(request.box_id)
        usage = await asyncio.to_thread(box.usage)
        sent, received = box.vsock_bytes()
        return pb.GetBoxStatsResponse(
            cpu_time=convert.duration(usage.cpu_seconds),
            resident_bytes=usage.resident,
            proportional_bytes=usage.proportional,
            private_bytes=usage.private,
            swap_bytes=usage.swapped,
            disk_read_bytes=usage.disk_read,
            disk_written_bytes=usage.disk_written,
            disk_bytes=box.disk_bytes(),
            vsock_sent_bytes=sent,
            vsock_received_bytes=received,
        )

    async def ReadConsole(
        self, request: pb.ReadConsoleRequest, context: Context
    ) -> AsyncIterator[pb.ReadConsoleResponse]:
        """Streams the console log."""
        box = self._registry.get(request.box_id)
        path = box.directory / layout.CONSOLE_FILE
        if not path.exists():
            raise WrongState(f"box {box.id} has no console yet", reason="NO_CONSOLE", box=box.id)
        async for offset, data in console.read(path, request.offset, follow=request.follow, ended=box.ended):
            yield pb.ReadConsoleResponse(offset=offset, data=data)

    async def ReadEgress(
        self, request: pb.ReadEgressRequest, context: Context
    ) -> AsyncIterator[pb.ReadEgressResponse]:
        """Streams what the gateway decided."""
        box = self._registry.get(request.box_id)
        path = box.directory / layout.EGRESS_FILE
        async for offset, found in events.read(path, request.offset, follow=request.follow, ended=box.ended):
            yield pb.ReadEgressResponse(next_offset=offset, events=map(convert_egress.event, found))

    async def ForwardPort(
        self, request_iterator: AsyncIterator[pb.ForwardPortRequest], context: Context
    ) -> AsyncIterator[pb.ForwardPortResponse]:
        """Tunnels a TCP connection."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("request") != "open":
            raise InvalidInput("the first message must be `open`", reason="BAD_FIRST_MESSAGE")
        box = self._registry.get(first.open.box_id)
        async with box.in_use():
            try:
                async for data in tunnel(box.guest, first.open.port, _upward(request_iterator)):
                    yield pb.ForwardPortResponse(data=data)
            except VoidboxError as error:
                raise await box.explain(error) from error

    async def ForkBox(self, request: pb.ForkBoxRequest, context: Context) -> pb.ForkBoxResponse:
        """Makes copies of a running box."""
        records, pause = await self._registry.fork(
            request.box_id, request.fork_ids, allow_secrets=request.allow_secrets
        )
        return pb.ForkBoxResponse(boxes=map(convert.box, records), pause=convert.duration(pause))

    async def UpdateBox(self, request: pb.UpdateBoxRequest, context: Context) -> pb.UpdateBoxResponse:
        """Changes limits of a running box."""
        box = self._registry.get(request.box_id)
        await update(box, convert.read_changes(request))
        return pb.UpdateBoxResponse(box=convert.box(box.record))

    async def BuildTemplate(
        self, request: pb.BuildTemplateRequest, context: Context
    ) -> pb.BuildTemplateResponse:
        """Builds a template, if it is not there."""
        seconds = DEFAULT_START_SECONDS
        if request.HasField("start_timeout"):
            seconds = convert.seconds(request.start_timeout, "start_timeout")
        launcher = self._registry.launcher
        template = await launcher.build_template(convert.read_config(request.config), seconds)
        return pb.BuildTemplateResponse(template=convert.template(template, launcher.pool.count(template.id)))

    async def ListTemplates(
        self, request: pb.ListTemplatesRequest, context: Context
    ) -> pb.ListTemplatesResponse:
        """Lists templates."""
        launcher = self._registry.launcher
        templates = await launcher.templates.all()
        found, token = convert.page(templates, request.page_size, request.page_token)
        answer = [convert.template(each, launcher.pool.count(each.id)) for each in found]
        return pb.ListTemplatesResponse(templates=answer, next_page_token=token)

    async def DeleteTemplate(
        self, request: pb.DeleteTemplateRequest, context: Context
    ) -> pb.DeleteTemplateResponse:
        """Removes a template."""
        await self._registry.launcher.delete_template(request.template_id)
        return pb.DeleteTemplateResponse()

    async def CreateSnapshot(
        self, request: pb.CreateSnapshotRequest, context: Context
    ) -> pb.CreateSnapshotResponse:
        """Saves a running box under a name."""
        box = self._registry.get(request.box_id)
        snapshot, pause = await self._registry.launcher.snapshot(
            box, request.name, allow_secrets=request.allow_secrets
        )
        return pb.CreateSnapshotResponse(snapshot=convert.snapshot(snapshot), pause=convert.duration(pause))

    async def GetSnapshot(self, request: pb.GetSnapshotRequest, context: Context) -> pb.GetSnapshotResponse:
        """Describes a snapshot."""
        snapshot = await self._registry.launcher.snapshots.get(request.name)
        return pb.GetSnapshotResponse(snapshot=convert.snapshot(snapshot))

    async def ListSnapshots(
        self, request: pb.ListSnapshotsRequest, context: Context
    ) -> pb.ListSnapshotsResponse:
        """Lists snapshots."""
        snapshots = await self._registry.launcher.snapshots.all()
        found, token = convert.page(snapshots, request.page_size, request.page_token)
        return pb.ListSnapshotsResponse(snapshots=map(convert.snapshot, found), next_page_token=token)

    async def DeleteSnapshot(
        self, request: pb.DeleteSnapshotRequest, context: Context
    ) -> pb.DeleteSnapshotResponse:
        """Removes a snapshot."""
        await self._registry.launcher.snapshots.delete(request.name)
        return pb.DeleteSnapshotResponse()

    async def CreateVolume(
        self, request: pb.CreateVolumeRequest, context: Context
    ) -> pb.CreateVolumeResponse:
        """Makes a named volume, if it is not there."""
        made = await self._registry.create_volume(request.name, request.size_mib)
        user = self._registry.volume_users().get(made.name, "")
        return pb.CreateVolumeResponse(volume=convert.volume(made, user))

    async def ListVolumes(self, request: pb.ListVolumesRequest, context: Context) -> pb.ListVolumesResponse:
        """Lists volumes by name."""
        volumes = await asyncio.to_thread(self._registry.launcher.volumes.all)
        found, token = convert.page(volumes, request.page_size, request.page_token)
        users = self._registry.volume_users()
        listed = [convert.volume(each, users.get(each.name, "")) for each in found]
        return pb.ListVolumesResponse(volumes=listed, next_page_token=token)

    async def DeleteVolume(
        self, request: pb.DeleteVolumeRequest, context: Context
    ) -> pb.DeleteVolumeResponse:
        """Removes a volume that no box uses."""
        await asyncio.to_thread(self._registry.launcher.volumes.delete, request.name)
        return pb.DeleteVolumeResponse()

    async def ListChanges(self, request: pb.ListChangesRequest, context: Context) -> pb.ListChangesResponse:
        """Lists what is kept of boxes' changes."""
        kept = await asyncio.to_thread(self._registry.launcher.changes.all, request.labels)
        found, token = convert.page(kept, request.page_size, request.page_token)
        return pb.ListChangesResponse(changes=map(convert_changes.change_set, found), next_page_token=token)

    async def ReadChanges(
        self, request: pb.ReadChangesRequest, context: Context
    ) -> AsyncIterator[pb.ReadChangesResponse]:
        """Streams what a box has changed."""
        selection = convert_changes.selection(request)
        async for each in self._registry.reviews.read(selection, content=request.content):
            yield convert_changes.read_response(each)

    async def ApplyChanges(
        self, request: pb.ApplyChangesRequest, context: Context
    ) -> AsyncIterator[pb.ApplyChangesResponse]:
        """Brings changes to the host."""
        done = await self._registry.reviews.apply(
            convert_changes.selection(request),
            dry_run=request.dry_run,
            force=request.force,
            trust=request.trust,
        )
        for overlay, outcomes in done:
            yield pb.ApplyChangesResponse(directory=convert_changes.directory(overlay))
            for each in outcomes:
                change = convert_changes.change(each.change)
                yield pb.ApplyChangesResponse(change=change, applied=each.applied)

    async def DeleteChanges(
        self, request: pb.DeleteChangesRequest, context: Context
    ) -> pb.DeleteChangesResponse:
        """Throws changes away."""
        await self._registry.delete_changes(request.box_id)
        return pb.DeleteChangesResponse()


async def _upward(requests: AsyncIterator[pb.ForwardPortRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("request") != "data":
            raise InvalidInput("only the first message may be `open`", reason="BAD_MESSAGE")
        yield request.data
