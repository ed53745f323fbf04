"""The bootstrap of every service: sockets, authentication, errors, health, reflection, channelz."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import signal
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.address import Address
from services.common.auth import check_token
from services.common.channel import MAX_MESSAGE_BYTES
from services.common.errors import Internal, InvalidInput, NotBuilt, VoidboxError, WrongState, abort
from services.common.paths import private_dir
from services.common.supervision import supervised

log = logging.getLogger(__name__)

# Calls under way get this long to end at shutdown; then they are cancelled.
SHUTDOWN_GRACE_SECONDS = 2.0

CHANNELZ = "grpc.channelz.v1.Channelz"

Register = Callable[[grpc.aio.Server], None]


@contextlib.asynccontextmanager
async def serve(
    addresses: Sequence[Address],
    register: Register,
    names: Sequence[str],
    *,
    handlers: Sequence[grpc.GenericRpcHandler] = (),
    forwarded: Sequence[str] = (),
    token: str = "",
) -> AsyncIterator[list[Address]]:
    """Serve until the block ends; yields the addresses with the ports that were bound.

    Args:
        addresses: Where to listen. Unix sockets are made with mode 0600 in a 0700 directory.
        register: Adds the servicers to the server.
        names: Full names of the services, for health and reflection.
        handlers: More handlers, e.g. forwarders.
        forwarded: Full names of the services that `handlers` serve, for reflection.
        token: What callers over TCP must send.

    Raises:
        InvalidInput: a TCP address without a token.
        WrongState: an address is in use.
    """
    if not token and any(address.path is None for address in addresses):
        raise InvalidInput("listening on TCP needs a token file (--token-file)", reason="MISSING_TOKEN_FILE")
    server = grpc.aio.server(
        interceptors=[_Edge(token)],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
        ],
    )
    register(server)
    server.add_generic_rpc_handlers(tuple(handlers))
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, _GenericOnly(server))  # type: ignore[arg-type]
    channelz.add_channelz_servicer(server)
    reflection.enable_server_reflection(
        (*names, *forwarded, health.SERVICE_NAME, CHANNELZ, reflection.SERVICE_NAME), server
    )
    bound: list[Address] = []
    try:
        for address in addresses:
            bound.append(_bind(server, address))
        await server.start()
        for name in ("", *names):
            await checker.set(name, health_pb2.HealthCheckResponse.SERVING)
        with supervised():
            yield bound
        await checker.enter_graceful_shutdown()
    finally:
        await server.stop(SHUTDOWN_GRACE_SECONDS)
        for address in bound:
            if address.path:
                address.path.unlink(missing_ok=True)


class _GenericOnly:
    """Registers a servicer's generic handler only, so that `handlers`, added before, may take its calls.

    gRPC asks for registered methods first, whatever was added before them.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers(tuple(handlers))

    def add_registered_method_handlers(self, service: str, methods: object) -> None:
        """Nothing: see the class."""


def _bind(server: grpc.aio.Server, address: Address) -> Address:
    if address.path is not None:
        private_dir(address.path.parent)
        _clear_stale_socket(address.path)
        before = os.umask(0o177)
        try:
            server.add_insecure_port(address.target)
        except RuntimeError as error:
            raise WrongState(f"cannot listen on {address}: {error}", reason="ADDRESS_IN_USE") from error
        finally:
            os.umask(before)
        return address
    try:
        port = server.add_insecure_port(address.target)
    except RuntimeError as error:
        raise WrongState(
            f"cannot listen on {address}: the port is in use or the host is not local",
            reason="ADDRESS_IN_USE",
        ) from error
    return Address(host=address.host, port=port)


def _clear_stale_socket(path: Path) -> None:
    """Remove a socket that nobody serves any more; never anything else."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise WrongState(f"{path} exists and is no socket; remove it", reason="ADDRESS_IN_USE", path=path)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
                return
        raise WrongState(
            f"another service listens on {path}; stop it first: voidbox down", reason="ADDRESS_IN_USE"
        )


class _Edge(grpc.aio.ServerInterceptor):
    """Checks the token of TCP callers and turns exceptions into statuses."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method: str = handler_call_details.method
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        behavior = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        guard = self._stream if handler.response_streaming else self._unary
        return make(guard(behavior, method), handler.request_deserializer, handler.response_serializer)

    def _authenticate(self, context: Any) -> None:
        if self._token and not context.peer().startswith("unix:"):
            check_token(self._token, context.invocation_metadata() or ())

    def _unary(self, behavior: Callable[..., Any], method: str) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            try:
                self._authenticate(context)
                result = behavior(request, context)
                return await result if inspect.isawaitable(result) else result
            except Exception as error:
                await _fail(context, error, method)

        return call

    def _stream(self, behavior: Callable[..., Any], method: str) -> Callable[..., Awaitable[None]]:
        async def call(request: Any, context: Any) -> None:
            try:
                self._authenticate(context)
                result = behavior(request, context)
                if inspect.isawaitable(result):
                    await result
                elif hasattr(result, "__aiter__"):
                    async with contextlib.aclosing(result) as messages:
                        async for message in messages:
                            await context.write(message)
                else:
                    raise Internal(f"{method}: the handler is not asynchronous")
            except Exception as error:
                await _fail(context, error, method)

        return call


async def _fail(context: Any, error: Exception, method: str) -> None:
    if isinstance(error, VoidboxError):
        await abort(context, error)
    if isinstance(error, NotImplementedError):
        await abort(context, NotBuilt(f"{method} is not built in this version", method=method))
    if isinstance(error, (grpc.RpcError, grpc.aio.AbortError)):
        raise error
    log.exception("%s failed", method)
    await abort(context, Internal(f"{method}: {type(error).__name__}: {error}", method=method))


async def until_signalled() -> None:
    """Return when the process is asked to end by SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()
