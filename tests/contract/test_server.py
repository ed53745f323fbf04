"""The server bootstrap on real sockets: statuses, tokens, forwarding, reflection, shutdown."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.common.address import Address
from services.common.channel import open_channel
from services.common.errors import (
    InvalidInput,
    NotBuilt,
    NotFound,
    Unauthenticated,
    Unavailable,
    VoidboxError,
    WrongState,
    from_rpc_error,
)
from services.common.forward import Forwarder, Metadata, Target
from services.common.server import CHANNELZ, serve
from voidbox import stubs
from voidbox.imager.v1 import imager_pb2, imager_pb2_grpc
from voidbox.orchestrator.v1 import orchestrator_pb2, orchestrator_pb2_grpc

IMAGER = "voidbox.imager.v1.ImagerService"
TOKEN = "a-token-of-many-characters"


class Imager(imager_pb2_grpc.ImagerServiceServicer):
    """Answers in each of the ways that a servicer can."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()
        self.metadata: Metadata = ()

    async def GetImage(self, request: Any, context: Any) -> imager_pb2.GetImageResponse:  # noqa: N802
        self.metadata = tuple(context.invocation_metadata())
        if request.reference == "missing":
            raise NotFound("no image 'missing'; pull it", image="missing")
        if request.reference == "defect":
            raise ZeroDivisionError("a defect")
        return imager_pb2.GetImageResponse(image=imager_pb2.Image(reference=request.reference))

    async def PullImage(self, request: Any, context: Any) -> AsyncIterator[imager_pb2.PullImageResponse]:  # noqa: N802
        self.started.set()
        try:
            for done in range(3):
                yield imager_pb2.PullImageResponse(progress=imager_pb2.Progress(done=done))
            if request.reference == "endless":
                await asyncio.Event().wait()
            raise Unavailable("the registry is gone")
        finally:
            self.cancelled.set()


class Uploads(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    async def UploadInput(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        size = 0
        async for request in request_iterator:
            size += len(request.data)
        response = orchestrator_pb2.UploadInputResponse()
        response.digest.size_bytes = size
        return response


@pytest.fixture
def short_dir() -> Any:
    with TemporaryDirectory(prefix="vb") as directory:
        yield Path(directory)


Serve = Callable[..., AbstractAsyncContextManager[tuple[Imager, list[Address]]]]


@pytest.fixture
def imager_at(short_dir: Path) -> Serve:
    @asynccontextmanager
    async def start(*addresses: Address, token: str = "") -> AsyncIterator[tuple[Imager, list[Address]]]:
        servicer = Imager()  # type: ignore[abstract]

        def register(server: grpc.aio.Server) -> None:
            imager_pb2_grpc.add_ImagerServiceServicer_to_server(servicer, server)
            orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(Uploads(), server)  # type: ignore[abstract]

        where = addresses or (Address(path=short_dir / "imager.sock"),)
        async with serve(where, register, [IMAGER], token=token) as bound:
            yield servicer, bound

    return start


async def failure(call: Any) -> VoidboxError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_errors_defects_and_unbuilt_methods_end_in_one_error_info(imager_at: Serve) -> None:
    async with imager_at() as (_, (address,)), open_channel(address) as channel:
        stub = stubs.imager(channel)
        missing = await failure(stub.GetImage(imager_pb2.GetImageRequest(reference="missing")))
        defect = await failure(stub.GetImage(imager_pb2.GetImageRequest(reference="defect")))
        unbuilt = await failure(stub.VerifyImage(imager_pb2.VerifyImageRequest()))
    assert (type(missing), missing.reason, missing.metadata) == (NotFound, "NOT_FOUND", {"image": "missing"})
    assert "ZeroDivisionError: a defect" in defect.message
    assert (type(unbuilt), unbuilt.reason) == (NotBuilt, "NOT_IMPLEMENTED")


async def test_a_stream_that_fails_delivers_what_came_before(imager_at: Serve) -> None:
    async with imager_at() as (_, (address,)), open_channel(address) as channel:
        stub = stubs.imager(channel)
        seen = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in stub.PullImage(imager_pb2.PullImageRequest()):
                seen.append(response.progress.done)
    assert seen == [0, 1, 2]
    assert type(from_rpc_error(caught.value)) is Unavailable


async def test_the_socket_is_private_and_gone_afterwards(imager_at: Serve, short_dir: Path) -> None:
    async with imager_at() as (_, (address,)):
        assert address.path is not None
        assert stat.S_IMODE(address.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(short_dir.stat().st_mode) == 0o700
    assert list(short_dir.iterdir()) == []


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(imager_at: Serve, short_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short_dir / "imager.sock"))
    async with imager_at():
        with pytest.raises(WrongState, match="another service listens"):
            async with imager_at():
                pass
        assert (short_dir / "imager.sock").exists()


async def test_a_file_in_place_of_the_socket_is_kept(imager_at: Serve, short_dir: Path) -> None:
    (short_dir / "imager.sock").write_text("mine")
    with pytest.raises(WrongState, match="is no socket"):
        async with imager_at():
            pass
    assert (short_dir / "imager.sock").read_text() == "mine"


async def test_tcp_needs_a_token_and_unix_does_not(imager_at: Serve, short_dir: Path) -> None:
    tcp, unix = Address(host="127.0.0.1"), Address(path=short_dir / "u.sock")
    with pytest.raises(InvalidInput, match="--token-file"):
        async with imager_at(tcp):
            pass
    async with imager_at(tcp, unix, token=TOKEN) as (_, (bound, _)):
        assert bound.port
        request = imager_pb2.GetImageRequest(reference="x")
        for address, token, reason in (
            (bound, TOKEN, ""),
            (unix, "", ""),
            (bound, "", "MISSING_TOKEN"),
            (bound, "wrong", "WRONG_TOKEN"),
        ):
            async with open_channel(address, token=token) as channel:
                stub = stubs.imager(channel)
                if not reason:
                    assert (await stub.GetImage(request)).image.reference == "x"
                    continue
                error = await failure(stub.GetImage(request))
                assert (type(error), error.reason) == (Unauthenticated, reason)


async def test_health_reflection_and_channelz_answer(imager_at: Serve) -> None:
    async with imager_at() as (_, (address,)), open_channel(address) as channel:
        # The annotations of these stubs know only blocking channels.
        health_stub: Any = health_pb2_grpc.HealthStub(channel)
        reflect: Any = reflection_pb2_grpc
        channelz: Any = channelz_pb2_grpc
        health = await health_stub.Check(health_pb2.HealthCheckRequest(service=IMAGER))
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        replies = reflect.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
        (reply,) = [reply async for reply in replies]
        assert {IMAGER, CHANNELZ} <= {service.name for service in reply.list_services_response.service}
        servers = await channelz.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest())
        assert servers.server


@asynccontextmanager
async def relay(short_dir: Path, upstream: Address, **extra: Any) -> AsyncIterator[grpc.aio.Channel]:
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(open_channel(upstream))

        async def resolve(method: str, metadata: Metadata) -> Target:
            if ("box", "unknown") in metadata:
                raise NotFound("no box 'unknown'")
            return Target(channel=channel, metadata=(("secret-bin", b"\x00\x01"),))

        names = [IMAGER, "voidbox.orchestrator.v1.OrchestratorService"]
        address = Address(path=short_dir / "relay.sock")
        forwarder = Forwarder(names, resolve, **extra)
        await stack.enter_async_context(serve([address], lambda server: None, [], handlers=[forwarder]))
        yield await stack.enter_async_context(open_channel(address))


async def test_forwarded_calls_carry_messages_errors_and_metadata_unchanged(
    imager_at: Serve, short_dir: Path
) -> None:
    async with imager_at() as (servicer, (upstream,)), relay(short_dir, upstream) as channel:
        stub = stubs.imager(channel)
        answer = await stub.GetImage(
            imager_pb2.GetImageRequest(reference="x"), metadata=(("box", "b"), ("authorization", "Bearer t"))
        )
        assert answer.image.reference == "x"
        passed = dict(servicer.metadata)
        assert (passed["box"], passed["secret-bin"]) == ("b", b"\x00\x01")
        assert "authorization" not in passed
        missing = await failure(stub.GetImage(imager_pb2.GetImageRequest(reference="missing")))
        assert (type(missing), missing.metadata) == (NotFound, {"image": "missing"})
        unknown = await failure(stub.GetImage(imager_pb2.GetImageRequest(), metadata=(("box", "unknown"),)))
        assert unknown.message == "no box 'unknown'"


async def test_forwarded_uploads_arrive_whole(imager_at: Serve, short_dir: Path) -> None:
    async with imager_at() as (_, (upstream,)), relay(short_dir, upstream) as channel:
        stub = stubs.orchestrator(channel)
        chunk = orchestrator_pb2.UploadInputRequest(data=b"x" * 65536)
        answer = await stub.UploadInput(iter([chunk] * 400))
    assert answer.digest.size_bytes == 400 * 65536


async def test_cancelling_a_forwarded_call_cancels_the_target(imager_at: Serve, short_dir: Path) -> None:
    async with imager_at() as (servicer, (upstream,)), relay(short_dir, upstream) as channel:
        call = stubs.imager(channel).PullImage(imager_pb2.PullImageRequest(reference="endless"))
        first: Any = await call.read()
        assert first.progress.done == 0
        call.cancel()
        async with asyncio.timeout(5):
            await servicer.cancelled.wait()


async def test_the_deadline_of_the_caller_reaches_the_target(imager_at: Serve, short_dir: Path) -> None:
    async with imager_at() as (servicer, (upstream,)), relay(short_dir, upstream) as channel:
        stub = stubs.imager(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.PullImage(imager_pb2.PullImageRequest(reference="endless"), timeout=0.3):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(5):
            await servicer.cancelled.wait()


async def test_a_better_error_can_replace_the_targets(imager_at: Serve, short_dir: Path) -> None:
    async def explain(metadata: Metadata, error: grpc.aio.AioRpcError) -> None:
        raise Unavailable("box b has died: killed", reason="BOX_DIED")

    async with imager_at() as (_, (upstream,)), relay(short_dir, upstream, explain=explain) as channel:
        error = await failure(stubs.imager(channel).GetImage(imager_pb2.GetImageRequest(reference="missing")))
    assert (error.message, error.reason) == ("box b has died: killed", "BOX_DIED")
