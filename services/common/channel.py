"""Client channels: one way to open them, with limits and bounded reconnection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from services.common.address import Address
from services.common.auth import AUTHORIZATION
from services.common.statuses import keep_statuses

keep_statuses()

# A chunk is at most 64 KiB (protos); the rest is room for long lists.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Local peers come back within milliseconds; the default backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    # Despite its name the time that one attempt may take, until the peer's first HTTP/2 frame.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Two channels to one socket must not share a dead subchannel.
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(
    address: Address, *, token: str = "", options: Sequence[tuple[str, Any]] = ()
) -> grpc.aio.Channel:
    """A channel to `address`; it connects on first use and is closed by `async with`."""
    return grpc.aio.insecure_channel(
        address.target,
        # Merged here: of an option that is given twice gRPC takes the first.
        options=list((dict(CHANNEL_OPTIONS) | dict(options)).items()),
        interceptors=[kind(token) for kind in _TOKEN_INTERCEPTORS] if token else [],
    )


class _Token:
    """Adds the bearer token to a call's metadata."""

    def __init__(self, token: str) -> None:
        self._value = f"Bearer {token}"

    async def _call(
        self, proceed: Callable[..., Awaitable[Any]], details: grpc.aio.ClientCallDetails, request: object
    ) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata.add(AUTHORIZATION, self._value)
        changed = grpc.aio.ClientCallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
        )
        return await proceed(changed, request)


class _UnaryUnary(_Token, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._call(continuation, client_call_details, request)


class _UnaryStream(_Token, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._call(continuation, client_call_details, request)


class _StreamUnary(_Token, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await self._call(continuation, client_call_details, request_iterator)


class _StreamStream(_Token, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await self._call(continuation, client_call_details, request_iterator)


_TOKEN_INTERCEPTORS: tuple[Callable[[str], grpc.aio.ClientInterceptor], ...] = (
    _UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream,
)  # fmt: skip
