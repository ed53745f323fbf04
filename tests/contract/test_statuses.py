"""A server that ends a stream while it is being written to: the client sees the server's status."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.common.address import Address
from services.common.channel import open_channel
from services.common.errors import NotFound
from services.common.forward import Forwarder, Metadata, Target
from services.common.server import serve
from voidbox import stubs
from voidbox.guest.v1 import guest_pb2, guest_pb2_grpc

GUEST = "voidbox.guest.v1.GuestService"
CALLS = 300


class Guest(guest_pb2_grpc.GuestServiceServicer):
    async def Exec(self, request_iterator: Any, context: Any) -> AsyncIterator[guest_pb2.ExecResponse]:  # noqa: N802
        async for _ in request_iterator:
            raise NotFound("there is no such program", reason="NO_PROGRAM")
        yield guest_pb2.ExecResponse()


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[Address]:
    """A guest behind two forwarders, as it is behind hypervisor and orchestrator."""
    guest = Guest()  # type: ignore[abstract]
    async with AsyncExitStack() as stack:
        here = Address(path=tmp_path / "s/0.sock")
        await stack.enter_async_context(
            serve(
                [here],
                lambda server: guest_pb2_grpc.add_GuestServiceServicer_to_server(guest, server),
                [GUEST],
            )
        )
        for hop in (1, 2):
            channel = await stack.enter_async_context(open_channel(here))

            async def resolve(_method: str, _metadata: Metadata, channel: Any = channel) -> Target:
                return Target(channel=channel)

            here = Address(path=tmp_path / f"s/{hop}.sock")
            forwarders = [Forwarder([GUEST], resolve)]
            await stack.enter_async_context(serve([here], lambda server: None, [], handlers=forwarders))
        yield here


async def test_a_refused_stream_never_loses_its_status(address: Address) -> None:
    seen: Counter[str] = Counter()
    async with open_channel(address) as channel:
        for _ in range(CALLS):
            call = stubs.guest(channel).Exec()
            try:
                for index in range(3):
                    request = guest_pb2.ExecRequest(start=guest_pb2.ExecStart(program=f"no-{index}"))
                    await call.write(request)
                await call.done_writing()
                assert await call.read() is grpc.aio.EOF
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
            seen[f"{(await call.code()).name}: {await call.details()}"] += 1
    assert seen == {"NOT_FOUND: there is no such program": CALLS}
