"""Forwarding of whole gRPC services to another server, message by message, untouched.

A generic handler with identity serializers: it knows no message type, so what it forwards
is the other server's protobuf exactly. Every method is treated as bidirectional, of which
the other three kinds are special cases on the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass

import grpc

from services.common.auth import AUTHORIZATION

# Set by gRPC itself, or meant for this hop only.
_HOP_KEYS = frozenset({AUTHORIZATION, "user-agent", "te", "content-type", "accept-encoding"})

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a call goes, and metadata to add; `died` ends when the target is known to be gone."""

    channel: grpc.aio.Channel
    metadata: Metadata = ()


Resolver = Callable[[str, Metadata], Awaitable[Target]]
"""From the method's full name and the caller's metadata to the target; raises a `VoidboxError`."""

ErrorHook = Callable[[Metadata, grpc.aio.AioRpcError], Awaitable[None]]
"""May raise a better error than the peer's own when a forwarded call fails."""


class Forwarder(grpc.GenericRpcHandler):
    """Serves all methods of `services` by forwarding them to the target that `resolve` names.

    Args:
        services: Full names, e.g. "voidbox.guest.v1.GuestService".
        resolve: Picks the target for each call.
        explain: Called when the target fails a call; may raise a better error.
    """

    def __init__(
        self, services: Collection[str], resolve: Resolver, explain: ErrorHook | None = None
    ) -> None:
        self._services = frozenset(services)
        self._resolve = resolve
        self._explain = explain

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """The handler for one call, or None if its service is not forwarded."""
        method = handler_call_details.method
        if method.rpartition("/")[0].removeprefix("/") not in self._services:
            return None

        async def forward(
            requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
        ) -> None:
            await self._forward(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(forward)

    async def _forward(
        self, method: str, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        received: Metadata = tuple((key, value) for key, value in context.invocation_metadata() or ())
        target = await self._resolve(method, received)
        passed = [(k, v) for k, v in received if k not in _HOP_KEYS and not k.startswith(("grpc-", ":"))]
        remaining = context.time_remaining()
        open_call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = target.channel.stream_stream(method)
        call = open_call(
            metadata=grpc.aio.Metadata(*passed, *target.metadata),
            # Without a deadline gRPC reports the largest representable time, which it does not take back.
            timeout=remaining if remaining is not None and remaining < 10**9 else None,
        )
        upstream = asyncio.create_task(_pump(requests, call))
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                await context.write(message)  # type: ignore[arg-type]
            code = await call.code()
            if code is not grpc.StatusCode.OK:
                await self._fail(received, call, code, context)
        except grpc.aio.AioRpcError:
            await self._fail(received, call, await call.code(), context)
        finally:
            upstream.cancel()
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await upstream

    async def _fail(
        self,
        received: Metadata,
        call: grpc.aio.StreamStreamCall[bytes, bytes],
        code: grpc.StatusCode,
        context: grpc.aio.ServicerContext[bytes, bytes],
    ) -> None:
        details = await call.details() or ""
        trailing = await call.trailing_metadata()
        if self._explain is not None:
            await self._explain(received, grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details))
        await context.abort(code, details, tuple((key, value) for key, value in trailing or ()))


async def _pump(requests: AsyncIterator[bytes], call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
    """Send the caller's messages on; a call that has ended takes no more, which is no error here."""
    with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
        async for message in requests:
            await call.write(message)
        await call.done_writing()
