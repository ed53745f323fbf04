"""A policy as the services tell each other of it."""

from __future__ import annotations

from services.common.egress.policy import DEFAULT_PORTS, Policy, Rule
from voidbox.common.v1 import common_pb2

_TLS = {
    "": common_pb2.EGRESS_TLS_UNSPECIFIED,
    "any": common_pb2.EGRESS_TLS_ANY,
    "strict": common_pb2.EGRESS_TLS_STRICT,
}


def to_message(policy: Policy) -> common_pb2.EgressPolicy:
    """The message of an enabled policy."""
    return common_pb2.EgressPolicy(
        enabled=policy.enabled,
        allow=map(_rule, policy.allow),
        deny=map(_rule, policy.deny),
        host_ports=policy.host_ports,
        max_connections=policy.limits.connections,
        max_connections_per_second=policy.limits.new_per_second,
        max_egress_bytes=policy.limits.total_bytes,
        max_bytes_per_second=policy.limits.bytes_per_second,
        learn=policy.learn,
    )


def _rule(rule: Rule) -> common_pb2.EgressRule:
    udp = rule.protocol == "udp"
    message = common_pb2.EgressRule(
        ports=() if rule.ports == DEFAULT_PORTS else rule.ports,
        addresses=[str(each) for each in rule.addresses],
        tls=_TLS[rule.tls],
        protocol=common_pb2.EGRESS_PROTOCOL_UDP if udp else common_pb2.EGRESS_PROTOCOL_UNSPECIFIED,
    )
    if rule.host:
        message.host = rule.host
    else:
        message.cidr = str(rule.cidr)
    return message
