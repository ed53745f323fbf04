"""One TCP connection into a box, as a pair of byte streams over the guest's `Connect`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc

from services.common.errors import InvalidInput, from_rpc_error
from services.hypervisor.claim import Guest
from voidbox.guest.v1 import guest_pb2

MAX_PORT = 65535
MAX_CHUNK = 64 * 1024


async def tunnel(guest: Guest, port: int, upward: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield what the guest's program sends; first an empty piece once the connection stands.

    Args:
        guest: The box's guest.
        port: TCP port of the guest's loopback.
        upward: What goes to the guest's program; its end half-closes the connection.

    Raises:
        InvalidInput: a port that cannot be.
        VoidboxError: as the guest says.
    """
    if not 1 <= port <= MAX_PORT:
        raise InvalidInput(f"port {port} must be 1 to {MAX_PORT}", reason="BAD_PORT", field="port")
    call = guest.stub.Connect(metadata=guest.metadata)
    await call.write(guest_pb2.ConnectRequest(open=guest_pb2.ConnectOpen(port=port)))

    async def send() -> None:
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            async for data in upward:
                await call.write(guest_pb2.ConnectRequest(data=data))
            await call.done_writing()

    sender = asyncio.create_task(send())
    try:
        async for message in call:
            yield message.data
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    finally:
        sender.cancel()
        call.cancel()
        await asyncio.gather(sender, return_exceptions=True)
