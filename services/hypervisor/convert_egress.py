"""Between an egress policy's message and the policy inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import duration_pb2, timestamp_pb2

from services.common.egress import plain
from services.common.egress.policy import Limits, Policy, Rule, make_rule
from services.common.egress.wire import to_message
from services.common.errors import InvalidInput
from voidbox.common.v1 import common_pb2

MAX_RULES = 1024
MAX_PORTS = 256
DEFAULT_CONNECTIONS, DEFAULT_NEW = 256, 50
_TLS = {
    common_pb2.EGRESS_TLS_UNSPECIFIED: "",
    common_pb2.EGRESS_TLS_ANY: "any",
    common_pb2.EGRESS_TLS_STRICT: "strict",
}
_PROTOCOLS = {
    common_pb2.EGRESS_PROTOCOL_UNSPECIFIED: "tcp",
    common_pb2.EGRESS_PROTOCOL_TCP: "tcp",
    common_pb2.EGRESS_PROTOCOL_UDP: "udp",
}


def read_egress(message: common_pb2.EgressPolicy) -> str:
    """A policy as a box's record has it; empty for a box without a network.

    Raises:
        InvalidInput: a value that cannot be; the message names the field.
    """
    if not message.enabled:
        if message.allow or message.host_ports or message.learn:
            raise InvalidInput("egress has rules but is not enabled", field="egress.enabled")
        return ""
    if len(message.allow) + len(message.deny) > MAX_RULES:
        raise InvalidInput(f"egress has more than {MAX_RULES} rules", field="egress.allow")
    if len(message.host_ports) > MAX_PORTS:
        raise InvalidInput(f"egress has more than {MAX_PORTS} host ports", field="egress.host_ports")
    for port in message.host_ports:
        if not 1 <= port <= 65535:
            raise InvalidInput(f"egress.host_ports: {port} is not 1 to 65535", field="egress.host_ports")
    for name in (
        "max_connections",
        "max_connections_per_second",
        "max_egress_bytes",
        "max_bytes_per_second",
    ):
        if getattr(message, name) < 0:
            raise InvalidInput(f"egress.{name} is negative", field=f"egress.{name}")
    return plain.to_json(
        Policy(
            enabled=True,
            allow=tuple(_read_rule(rule, "allow") for rule in message.allow),
            deny=tuple(_read_rule(rule, "deny") for rule in message.deny),
            host_ports=tuple(message.host_ports),
            limits=Limits(
                connections=message.max_connections or DEFAULT_CONNECTIONS,
                new_per_second=message.max_connections_per_second or DEFAULT_NEW,
                bytes_per_second=message.max_bytes_per_second,
                total_bytes=message.max_egress_bytes,
            ),
            learn=message.learn,
        )
    )


def _read_rule(message: common_pb2.EgressRule, field: str) -> Rule:
    if message.tls not in _TLS or message.protocol not in _PROTOCOLS:
        raise InvalidInput(f"egress.{field}: unknown tls or protocol", field=f"egress.{field}")
    try:
        return make_rule(
            host=message.host,
            cidr=message.cidr,
            ports=message.ports,
            protocol=_PROTOCOLS[message.protocol],
            addresses=message.addresses,
            tls=_TLS[message.tls],
        )
    except ValueError as error:
        raise InvalidInput(f"egress.{field}: {error}", reason="BAD_RULE", field=f"egress.{field}") from error


def egress(text: str) -> common_pb2.EgressPolicy:
    """A box's policy as clients see it."""
    return to_message(plain.from_json(text))


def event(found: Mapping[str, Any]) -> common_pb2.EgressEvent:
    """An event as clients see it."""
    micros = round(float(found["time"]) * 1e6)
    nanos = round(float(found.get("duration", 0)) * 1e9)
    return common_pb2.EgressEvent(
        time=timestamp_pb2.Timestamp(seconds=micros // 10**6, nanos=micros % 10**6 * 1000),
        kind=found["kind"],
        allowed=found["allowed"],
        name=found.get("name", ""),
        address=found.get("address", ""),
        port=found.get("port", 0),
        rule=found.get("rule", ""),
        reason=found.get("reason", ""),
        sent_bytes=found.get("sent", 0),
        received_bytes=found.get("received", 0),
        duration=duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9),
        detail={str(key): str(value) for key, value in found.get("detail", {}).items()},
    )
