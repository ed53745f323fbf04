"""An asynchronous client of one stack: everything behind the orchestrator's address.

    async with Client.open(Address.parse("unix:/run/user/1000/voidbox/orchestrator.sock")) as client:
        run = await client.create_run(request)
        async for event in client.watch_run(run.id):
            ...

Failures are `VoidboxError`s. Calls that can be repeated are, while a service restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import grpc
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_exponential

from services.common.address import Address
from services.common.channel import open_channel
from services.common.errors import Cancelled, InvalidInput, Unavailable, from_rpc_error
from voidbox import stubs
from voidbox.archive import CHUNK_BYTES, pack, read_file
from voidbox.execution import Execution
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2
from voidbox.imager.v1 import imager_pb2
from voidbox.orchestrator.v1 import orchestrator_pb2
from voidbox.outage import RECONNECT_SECONDS, Outage

T = TypeVar("T")


class Paged(Protocol):
    """A page of any list."""

    @property
    def next_page_token(self) -> str:
        """Names the page after it; empty on the last."""
        ...


Page = TypeVar("Page", bound=Paged)

BOX_KEY = "voidbox-box-id"

# Calls that only look something up or note a wish.
CALL_SECONDS = 30.0
# Pages are small; more are asked for as needed.
_PAGE = 100

ACTIVE_STATES = frozenset(
    (
        orchestrator_pb2.RUN_STATE_PENDING,
        orchestrator_pb2.RUN_STATE_RUNNING,
        orchestrator_pb2.RUN_STATE_CANCELLING,
    )
)


@contextlib.contextmanager
def rpc_errors() -> Iterator[None]:
    """Turn gRPC's errors into the exceptions that the peer raised."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def _retrying(seconds: float = RECONNECT_SECONDS) -> AsyncRetrying:
    return AsyncRetrying(
        retry=retry_if_exception_type(Unavailable),
        stop=stop_after_delay(seconds),
        wait=wait_exponential(multiplier=0.05, max=1),
        reraise=True,
    )


class Client:
    """Calls to one stack. The stubs are there for what has no method of its own.

    Args:
        channel: A channel to an orchestrator; closed by `Client.open`.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.orchestrator = stubs.orchestrator(channel)
        self.imager = stubs.imager(channel)
        self.hypervisor = stubs.hypervisor(channel)
        self.guest = stubs.guest(channel)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, address: Address, token: str = "") -> AsyncIterator[Client]:
        """A client of the orchestrator at `address`; connects on first use."""
        async with open_channel(address, token=token) as channel:
            yield cls(channel)

    async def call(self, make: Callable[[], Awaitable[T]], *, seconds: float = RECONNECT_SECONDS) -> T:
        """Await `make()`, again while the service is unavailable; it must be repeatable.

        Raises:
            VoidboxError: what the peer raised.
        """
        async for attempt in _retrying(seconds):
            with attempt, rpc_errors():
                return await make()
        raise AssertionError("unreachable")

    async def pages(self, method: Callable[..., Awaitable[Page]], request: Any) -> AsyncIterator[Page]:
        """All pages of a list, `request` being for the first; it is used up.

        Raises:
            VoidboxError: what the peer raised.
        """
        while True:
            page = await self.call(partial(method, request, timeout=CALL_SECONDS))
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def status(self, *, seconds: float = 0.0) -> orchestrator_pb2.GetStatusResponse:
        """How the services are; tries for `seconds` to reach the orchestrator."""
        request = orchestrator_pb2.GetStatusRequest()
        return await self.call(
            lambda: self.orchestrator.GetStatus(request, timeout=CALL_SECONDS), seconds=seconds
        )

    async def create_run(self, request: orchestrator_pb2.CreateRunRequest) -> orchestrator_pb2.Run:
        """Start a run; `request.run_id` must be set, so that the call can be repeated."""
        if not request.run_id:
            raise InvalidInput("a run id is needed", reason="MISSING_RUN_ID")
        response = await self.call(lambda: self.orchestrator.CreateRun(request, timeout=CALL_SECONDS))
        return response.run

    async def get_run(self, run_id: str, *, seconds: float = RECONNECT_SECONDS) -> orchestrator_pb2.Run:
        """Describe a run; tries for `seconds` to reach the orchestrator."""
        request = orchestrator_pb2.GetRunRequest(run_id=run_id)
        response = await self.call(
            lambda: self.orchestrator.GetRun(request, timeout=CALL_SECONDS), seconds=seconds
        )
        return response.run

    async def list_runs(self, *, active: bool = False) -> AsyncIterator[orchestrator_pb2.Run]:
        """All runs, newest first."""
        request = orchestrator_pb2.ListRunsRequest(page_size=_PAGE, active=active)
        async for page in self.pages(self.orchestrator.ListRuns, request):
            for run in page.runs:
                yield run

    async def cancel_run(self, run_id: str, reason: str) -> orchestrator_pb2.Run:
        """Ask a run to stop; `wait_run` tells when it has."""
        request = orchestrator_pb2.CancelRunRequest(run_id=run_id, reason=reason)
        # The answer may come only after the boxes have ended.
        return (await self.call(lambda: self.orchestrator.CancelRun(request, timeout=120))).run

    async def delete_run(self, run_id: str) -> None:
        """Remove an ended run."""
        request = orchestrator_pb2.DeleteRunRequest(run_id=run_id)
        await self.call(lambda: self.orchestrator.DeleteRun(request, timeout=CALL_SECONDS))

    async def watch_run(
        self, run_id: str, from_offset: int = 0, *, follow: bool = True
    ) -> AsyncIterator[orchestrator_pb2.Event]:
        """The run's events from an offset on, each once, over any number of connections.

        Raises:
            Unavailable: the orchestrator stayed away for `RECONNECT_SECONDS`.
        """
        offset = from_offset
        outage = Outage()
        # Whether the last thing heard of the run is that it has ended.
        ended = False
        while True:
            request = orchestrator_pb2.WatchRunRequest(
                run_id=run_id, from_offset=offset, no_follow=not follow
            )
            call = self.orchestrator.WatchRun(request)
            try:
                with rpc_errors():
                    while True:
                        response = await call.read()
                        if response is grpc.aio.EOF:
                            break
                        outage.over()
                        event = cast("orchestrator_pb2.WatchRunResponse", response).event
                        yield event
                        offset = event.offset + 1
                        if event.WhichOneof("event") == "run_state":
                            ended = event.run_state.state not in ACTIVE_STATES
            except (Unavailable, Cancelled) as error:  # CANCELLED: the server is shutting down
                if ended:
                    return
                await outage.wait(error)
                continue
            finally:
                call.cancel()
            # A server that stops may end the stream in good order before the run has ended.
            if not follow or ended or (await self.get_run(run_id)).state not in ACTIVE_STATES:
                return
            await outage.wait(Unavailable("the orchestrator ended the stream of events"))

    async def wait_run(self, run_id: str) -> orchestrator_pb2.Run:
        """Wait until a run has ended."""
        run = await self.get_run(run_id)
        if run.state in ACTIVE_STATES:
            async for _ in self.watch_run(run_id, run.event_count):
                pass
            run = await self.get_run(run_id)
        return run

    async def upload(
        self, path: Path, advance: Callable[[int], None] = lambda _: None
    ) -> orchestrator_pb2.InputFile:
        """Store a file or directory tree for a run; `InputFile.path` is `path`.

        Args:
            path: A file or directory of this host.
            advance: Called with the number of bytes of each piece that was sent.

        Raises:
            InvalidInput: it cannot be read.
        """
        tree = path.is_dir()

        async def send() -> orchestrator_pb2.UploadInputResponse:
            call = self.orchestrator.UploadInput()
            try:
                header = orchestrator_pb2.UploadInputHeader(tree=tree)
                await call.write(orchestrator_pb2.UploadInputRequest(header=header))
                async for data in in_thread(pack(path) if tree else read_file(path)):
                    await call.write(orchestrator_pb2.UploadInputRequest(data=data))
                    advance(len(data))
                await call.done_writing()
                return await call
            except asyncio.InvalidStateError:  # the server ended the call before it had everything
                return await call
            finally:
                call.cancel()

        response = await self.call(send)
        return orchestrator_pb2.InputFile(path=str(path), digest=response.digest, tree=tree)

    async def read_artifact(self, run_id: str, stage: str, name: str) -> AsyncIterator[bytes]:
        """Stream an artifact."""
        request = orchestrator_pb2.ReadArtifactRequest(run_id=run_id, stage=stage, name=name)
        with rpc_errors():
            async for response in self.orchestrator.ReadArtifact(request):
                yield response.data

    async def list_boxes(self) -> AsyncIterator[hypervisor_pb2.Box]:
        """All boxes of the host."""
        request = hypervisor_pb2.ListBoxesRequest(page_size=_PAGE)
        async for page in self.pages(self.hypervisor.ListBoxes, request):
            for box in page.boxes:
                yield box

    async def capabilities(self, *, refresh: bool = False) -> hypervisor_pb2.GetCapabilitiesResponse:
        """What the host can do; a refreshed answer takes as long as the probes."""
        request = hypervisor_pb2.GetCapabilitiesRequest(refresh=refresh)
        return await self.call(lambda: self.hypervisor.GetCapabilities(request, timeout=120))

    async def get_image(self, reference: str) -> imager_pb2.Image:
        """Describe a cached image."""
        request = imager_pb2.GetImageRequest(reference=reference)
        return (await self.call(lambda: self.imager.GetImage(request, timeout=CALL_SECONDS))).image

    def execute(
        self, box_id: str, start: guest_pb2.ExecStart, stdin: AsyncIterator[bytes] | None = None
    ) -> Execution:
        """A program in a box; an asynchronous context manager, see `Execution`."""
        return Execution(self.guest, ((BOX_KEY, box_id),), start, stdin)

    async def stat(self, box_id: str, path: str) -> guest_pb2.FileInfo:
        """Describe a file of a box."""
        request = guest_pb2.StatFileRequest(path=path)
        metadata = ((BOX_KEY, box_id),)
        response = await self.call(
            lambda: self.guest.StatFile(request, metadata=metadata, timeout=CALL_SECONDS)
        )
        return response.file

    async def read_file(self, box_id: str, path: str) -> AsyncIterator[bytes]:
        """Stream a file of a box."""
        request = guest_pb2.ReadFileRequest(path=path)
        with rpc_errors():
            async for response in self.guest.ReadFile(request, metadata=((BOX_KEY, box_id),)):
                yield response.data

    async def read_tree(self, box_id: str, path: str) -> AsyncIterator[bytes]:
        """Stream a directory of a box as a tar archive; not to be trusted."""
        request = guest_pb2.ReadTreeRequest(path=path)
        with rpc_errors():
            async for response in self.guest.ReadTree(request, metadata=((BOX_KEY, box_id),)):
                yield response.data

    async def write_file(self, box_id: str, path: str, mode: int, chunks: AsyncIterator[bytes]) -> int:
        """Write a file of a box, whole or not at all; returns its length."""
        call = self.guest.WriteFile(metadata=((BOX_KEY, box_id),))
        header = guest_pb2.WriteFileHeader(path=path, mode=mode)
        with rpc_errors():
            try:
                await call.write(guest_pb2.WriteFileRequest(header=header))
                async for data in chunks:
                    await call.write(guest_pb2.WriteFileRequest(data=data))
                await call.done_writing()
            except asyncio.InvalidStateError:
                pass
            except BaseException:
                call.cancel()
                raise
            return (await call).size_bytes

    async def write_tree(self, box_id: str, path: str, chunks: AsyncIterator[bytes]) -> int:
        """Unpack a tar archive below a directory of a box; returns the number of entries."""
        call = self.guest.WriteTree(metadata=((BOX_KEY, box_id),))
        header = guest_pb2.WriteTreeHeader(path=path)
        with rpc_errors():
            try:
                await call.write(guest_pb2.WriteTreeRequest(header=header))
                async for data in chunks:
                    await call.write(guest_pb2.WriteTreeRequest(data=data))
                await call.done_writing()
            except asyncio.InvalidStateError:
                pass
            except BaseException:
                call.cancel()
                raise
            return (await call).entries


async def in_thread(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces of a blocking iterator, each made in a thread."""
    while (data := await asyncio.to_thread(next, chunks, None)) is not None:
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]
