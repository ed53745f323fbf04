"""Health, reflection and channelz: answered, but not loaded before somebody asks."""

from __future__ import annotations

from typing import Any

import grpc

from guest.errors import AgentError
from guest.rpc import Gate

_HEALTH = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/"
_CHANNELZ = "/grpc.channelz.v1.Channelz/"
_NAMES = (
    "voidbox.guest.v1.GuestService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "grpc.channelz.v1.Channelz",
)


class LazyServices(grpc.GenericRpcHandler):
    """Builds a standard service's handlers at the first call to it.

    Health needs no secret: whoever waits for a box asks it before the box is claimed.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._built: dict[str, Any] = {}

    def service(self, handler_call_details: Any) -> Any:
        """The handler of one method, or None."""
        method: str = handler_call_details.method
        for prefix, build in ((_HEALTH, _health), (_REFLECTION, _reflection), (_CHANNELZ, _channelz)):
            if not method.startswith(prefix):
                continue
            if prefix not in self._built:
                self._built[prefix] = build()
            handler = self._built[prefix].service(handler_call_details)
            if handler is None or prefix == _HEALTH:
                return handler
            try:
                self._gate.check(handler_call_details.invocation_metadata, before_claim=True)
            except AgentError as error:
                return _refusal(handler, error)
            return handler
        return None


class _Collector:
    """Takes the place of a server in the generated `add_…_to_server`."""

    handler: Any

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self.handler = handlers[0]

    def add_registered_method_handlers(self, *_: Any) -> None:
        pass


def _health() -> Any:
    from grpc_health.v1 import health_pb2_grpc
    from grpc_health.v1._async import HealthServicer
    from grpc_health.v1.health_pb2 import HealthCheckResponse

    class Servicer(HealthServicer):
        def __init__(self) -> None:
            super().__init__()
            for name in _NAMES:
                self._server_status[name] = HealthCheckResponse.SERVING  # type: ignore[attr-defined]

    collector: Any = _Collector()
    health_pb2_grpc.add_HealthServicer_to_server(Servicer(), collector)
    return collector.handler


def _reflection() -> Any:
    # The descriptors of what is listed have to be known.
    import grpc_health.v1.health_pb2  # noqa: F401
    from grpc_reflection.v1alpha import reflection_pb2_grpc
    from grpc_reflection.v1alpha._async import ReflectionServicer

    collector: Any = _Collector()
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
        ReflectionServicer(_NAMES), collector
    )
    return collector.handler


def _channelz() -> Any:
    from grpc_channelz.v1 import channelz_pb2_grpc
    from grpc_channelz.v1._async import ChannelzServicer

    collector: Any = _Collector()
    channelz_pb2_grpc.add_ChannelzServicer_to_server(ChannelzServicer(), collector)
    return collector.handler


def _refusal(handler: Any, error: AgentError) -> Any:
    """A handler of the same shape that fails with `error`."""

    async def refuse(_request: Any, context: Any) -> None:
        await context.abort(error.code, error.message, error.trailing())

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(refuse, handler.request_deserializer, handler.response_serializer)
