"""OrchestratorService on the wire: validate, convert, call, convert."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

from services.common.errors import InvalidInput, NotBuilt, NotFound
from services.orchestrator import convert
from services.orchestrator.blobs import reading
from services.orchestrator.engine import initial
from services.orchestrator.plan import make_plan
from services.orchestrator.service import Orchestrator, stages_of
from services.orchestrator.support import check_supported
from voidbox import __version__
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb
from voidbox.orchestrator.v1 import orchestrator_pb2_grpc
from voidbox.spec import SpecError, parse_spec

_Context = Any

# Half of what a message may hold, as the last run may be large too.
_PAGE_BYTES = 2 << 20


class Servicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Translates between the wire and `Orchestrator`."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator

    async def ValidateSpec(
        self, request: pb.ValidateSpecRequest, context: _Context
    ) -> pb.ValidateSpecResponse:
        """Check a spec."""
        content, filename = request.spec.content, request.spec.filename or "spec.yaml"
        try:
            spec = await asyncio.to_thread(parse_spec, content, filename, "/")
            check_supported(spec)
        except SpecError as error:
            problems = [
                pb.SpecProblem(line=item.line, column=item.column, path=item.path, message=item.message)
                for item in error.problems
            ]
            return pb.ValidateSpecResponse(problems=problems)
        except NotBuilt as error:
            wishes = [line.split(": ", 1) for line in error.message.splitlines()]
            return pb.ValidateSpecResponse(
                problems=[pb.SpecProblem(path=path, message=message) for path, message in wishes]
            )
        plan = make_plan(spec)
        stages = [convert.stage_to_proto(stage) for stage in stages_of(plan, initial(plan))]
        return pb.ValidateSpecResponse(kind=convert.kind_to_proto(spec.kind), stages=stages)

    async def UploadInput(
        self, request_iterator: AsyncIterator[pb.UploadInputRequest], context: _Context
    ) -> pb.UploadInputResponse:
        """Store an input."""
        limit = self._orchestrator.limits.artifact_bytes
        with self._orchestrator.blobs.writer(limit) as writer:
            first = True
            async for request in request_iterator:
                if first != (request.WhichOneof("request") == "header"):
                    raise InvalidInput(
                        "the first message must be `header`, all others `data`", reason="BAD_STREAM"
                    )
                first = False
                if request.data:
                    await asyncio.to_thread(writer.write, request.data)
            if first:
                raise InvalidInput("the stream is empty; send `header` first", reason="BAD_STREAM")
            digest = await asyncio.to_thread(writer.commit)
        return pb.UploadInputResponse(digest=convert.digest_to_proto(digest))

    async def CreateRun(self, request: pb.CreateRunRequest, context: _Context) -> pb.CreateRunResponse:
        """Accept a run."""
        asked = convert.request_from_proto(request)
        run = await self._orchestrator.create(request.run_id, asked, convert.request_digest(request))
        return pb.CreateRunResponse(run=convert.run_to_proto(run))

    async def GetRun(self, request: pb.GetRunRequest, context: _Context) -> pb.GetRunResponse:
        """Describe a run."""
        return pb.GetRunResponse(run=convert.run_to_proto(await self._orchestrator.get(request.run_id)))

    async def ListRuns(self, request: pb.ListRunsRequest, context: _Context) -> pb.ListRunsResponse:
        """List runs."""
        size = _page_size(request.page_size, 50, 500)
        before = None
        if request.page_token:
            if not (request.page_token.isascii() and request.page_token.isdecimal()):
                raise _bad_token()
            before = min(int(request.page_token[:19]), 1 << 62)
        found = await self._orchestrator.list_runs(size + 1, before, request.active)
        page = pb.ListRunsResponse()
        for number, run in found[:size]:
            if page.runs and page.ByteSize() > _PAGE_BYTES:
                break
            page.runs.append(convert.run_to_proto(run, brief=True))
            page.next_page_token = str(number)
        if len(page.runs) == len(found):
            page.next_page_token = ""
        return page

    async def WatchRun(
        self, request: pb.WatchRunRequest, context: _Context
    ) -> AsyncIterator[pb.WatchRunResponse]:
        """Stream a run's events."""
        events = self._orchestrator.watch(request.run_id, request.from_offset, follow=not request.no_follow)
        try:
            async for offset, payload in events:
                yield pb.WatchRunResponse(event=convert.event_from_bytes(offset, payload))
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def CancelRun(self, request: pb.CancelRunRequest, context: _Context) -> pb.CancelRunResponse:
        """Stop a run."""
        run = await self._orchestrator.cancel(request.run_id, request.reason[:1000])
        return pb.CancelRunResponse(run=convert.run_to_proto(run))

    async def RetryRun(self, request: pb.RetryRunRequest, context: _Context) -> pb.RetryRunResponse:
        """Run again what did not succeed."""
        return pb.RetryRunResponse(run=convert.run_to_proto(await self._orchestrator.retry(request.run_id)))

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: _Context) -> pb.DeleteRunResponse:
        """Remove a run."""
        await self._orchestrator.delete(request.run_id)
        return pb.DeleteRunResponse()

    async def ListArtifacts(
        self, request: pb.ListArtifactsRequest, context: _Context
    ) -> pb.ListArtifactsResponse:
        """List artifacts."""
        size = _page_size(request.page_size, 100, 1000)
        after = _read_token(request.page_token)
        found = await self._orchestrator.artifacts(request.run_id, request.stage, after, size + 1)
        last = found[size - 1] if len(found) > size else None
        return pb.ListArtifactsResponse(
            artifacts=[convert.artifact_to_proto(artifact) for artifact in found[:size]],
            next_page_token=_write_token(last.stage, last.name) if last else "",
        )

    async def ReadArtifact(
        self, request: pb.ReadArtifactRequest, context: _Context
    ) -> AsyncIterator[pb.ReadArtifactResponse]:
        """Stream an artifact."""
        artifact = await self._orchestrator.artifact(request.run_id, request.stage, request.name)
        if artifact is None:
            message = f"stage {request.stage!r} has no artifact {request.name!r}; see: ListArtifacts"
            raise NotFound(message, reason="NO_ARTIFACT", run_id=request.run_id)
        async with reading(self._orchestrator.blobs.find(artifact.digest.value)) as chunks:
            async for data in chunks:
                yield pb.ReadArtifactResponse(data=data)

    async def GetStatus(self, request: pb.GetStatusRequest, context: _Context) -> pb.GetStatusResponse:
        """Report how the services are."""
        peers = self._orchestrator.peers
        found = await asyncio.gather(peers.health("imager"), peers.health("hypervisor"))
        return pb.GetStatusResponse(
            version=__version__,
            active_runs=self._orchestrator.active_runs,
            services=[
                pb.ServiceStatus(
                    name=health.name,
                    address=health.address,
                    reachable=health.reachable,
                    detail=health.detail,
                )
                for health in found
            ],
        )


def _page_size(asked: int, default: int, most: int) -> int:
    if asked < 0:
        raise InvalidInput("page_size must not be negative", reason="BAD_PAGE_SIZE")
    return min(asked or default, most)


def _bad_token() -> InvalidInput:
    return InvalidInput("page_token is not one that this service gave", reason="BAD_PAGE_TOKEN")


def _write_token(stage: str, name: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([stage, name]).encode()).decode()


def _read_token(token: str) -> tuple[str, str]:
    if not token:
        return "", ""
    try:
        stage, name = json.loads(base64.urlsafe_b64decode(token.encode()))
    except ValueError as error:
        raise _bad_token() from error
    if not isinstance(stage, str) or not isinstance(name, str):
        raise _bad_token()
    return stage, name
