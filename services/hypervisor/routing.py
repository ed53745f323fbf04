"""Forwarding of guest calls to the box that their metadata names, the box's secret added."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc

from services.common.errors import (
    Denied,
    InvalidInput,
    NotFound,
    Unavailable,
    VoidboxError,
    abort,
    from_rpc_error,
)
from services.common.forward import Forwarder, Metadata, Target
from services.hypervisor.claim import SECRET_KEY
from services.hypervisor.registry import Registry

BOX_KEY = "voidbox-box-id"
GUEST_SERVICE = "voidbox.guest.v1.GuestService"
HEALTH_SERVICE = "grpc.health.v1.Health"
# What only the hypervisor itself may ask of a guest.
OBSERVING = frozenset((f"/{GUEST_SERVICE}/Telemetry", f"/{HEALTH_SERVICE}/Check", f"/{HEALTH_SERVICE}/Watch"))
"""Who only looks on neither keeps a box awake nor wakes it."""
RESERVED = frozenset({"Claim", "Mount", "ConfigureNetwork", "FreezePrograms", "SetClock"})


def box_id_of(metadata: Metadata) -> str | None:
    """The box that a call names; None if it names none.

    Raises:
        InvalidInput: it names several.
    """
    found = {value for key, value in metadata if key == BOX_KEY and isinstance(value, str)}
    if len(found) > 1:
        raise InvalidInput(f"metadata {BOX_KEY} is given more than once", reason="BAD_BOX_ID")
    return next(iter(found), None)


class BoxForwarder(grpc.GenericRpcHandler):
    """Serves GuestService, and Health for calls that name a box."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._forwarder = Forwarder((GUEST_SERVICE, HEALTH_SERVICE), self._resolve, self._explain)

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """The handler for one call, or None if it is not the guest's."""
        metadata = tuple(handler_call_details.invocation_metadata or ())
        if handler_call_details.method.startswith(f"/{HEALTH_SERVICE}/") and not any(
            key == BOX_KEY for key, _ in metadata
        ):
            return None  # our own health
        handler = self._forwarder.service(handler_call_details)
        if handler is None or handler.stream_stream is None:
            return handler
        forward = handler.stream_stream
        observes = handler_call_details.method in OBSERVING

        async def counted(
            requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
        ) -> None:
            async with contextlib.AsyncExitStack() as stack:
                box_id = box_id_of(tuple((key, value) for key, value in metadata))
                if box_id and not observes:
                    try:
                        await stack.enter_async_context(self._registry.get(box_id).in_use())
                    except VoidboxError as error:
                        await abort(context, error)
                await forward(requests, context)  # type: ignore[arg-type, misc]

        return grpc.stream_stream_rpc_method_handler(counted)

    async def _resolve(self, method: str, metadata: Metadata) -> Target:
        name = method.rpartition("/")[2]
        box_id = box_id_of(metadata)
        if not box_id:
            raise InvalidInput(
                f"{name} needs a box: send its id as metadata {BOX_KEY}", reason="MISSING_BOX_ID"
            )
        if name in RESERVED:
            raise Denied(f"{name} is the hypervisor's own to call", reason="RESERVED_METHOD", method=name)
        if any(key == SECRET_KEY for key, _ in metadata):
            raise Denied(f"metadata {SECRET_KEY} is the hypervisor's own to send", reason="RESERVED_METADATA")
        box = self._registry.get(box_id)
        guest = box.guest
        if name == "Shutdown":
            box.asked_to_power_off()
        return Target(channel=guest.channel, metadata=guest.metadata)

    async def _explain(self, metadata: Metadata, error: grpc.aio.AioRpcError) -> None:
        """Say that the box has ended where the guest's connection merely broke."""
        box_id = box_id_of(metadata)
        if not box_id:
            return
        failure = from_rpc_error(error)
        try:
            box = self._registry.get(box_id)
        except NotFound:
            raise Unavailable(f"box {box_id} was deleted", reason="BOX_DIED", box=box_id) from None
        explained = await box.explain(failure)
        if explained is not failure:
            raise explained
