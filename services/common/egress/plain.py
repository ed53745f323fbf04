"""A policy as JSON, for a process's configuration and a box's record."""

from __future__ import annotations

import json
from typing import Any

from services.common.egress.policy import Limits, Policy, Rule, make_rule


def to_json(policy: Policy) -> str:
    """What `from_json` reads."""
    return json.dumps(
        {
            "enabled": policy.enabled,
            "allow": [_rule(rule) for rule in policy.allow],
            "deny": [_rule(rule) for rule in policy.deny],
            "host_ports": policy.host_ports,
            "limits": {name: getattr(policy.limits, name) for name in Limits.__slots__},
            "learn": policy.learn,
        },
        separators=(",", ":"),
    )


def from_json(text: str) -> Policy:
    """The policy that `to_json` was given; checked again.

    Raises:
        ValueError, TypeError, KeyError: it is not one.
    """
    document = json.loads(text)
    return Policy(
        enabled=bool(document["enabled"]),
        allow=tuple(make_rule(**rule) for rule in document["allow"]),
        deny=tuple(make_rule(**rule) for rule in document["deny"]),
        host_ports=tuple(map(int, document["host_ports"])),
        limits=Limits(**document["limits"]),
        learn=bool(document["learn"]),
    )


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "host": rule.host,
        "cidr": str(rule.cidr) if rule.cidr is not None else "",
        "ports": rule.ports,
        "protocol": rule.protocol,
        "addresses": [str(each) for each in rule.addresses],
        "tls": rule.tls,
    }
