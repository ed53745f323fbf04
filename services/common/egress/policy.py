"""What a box may reach, and the decision for one connection or question."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Literal

from services.common.egress.addresses import METADATA, Address, Network, is_special, special_kind
from services.common.egress.names import matches, normalize_pattern

Protocol = Literal["tcp", "udp"]
Tls = Literal["", "any", "strict"]

KEY = "sandbox.network.allow"
DEFAULT_PORTS = (80, 443)
ALL_PORTS = (0,)
"""A rule with port 0 is for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One allowance or denial: `host` or `cidr`, and ports.

    Attributes:
        host: A DNS name, "*." and a suffix, or "*".
        cidr: A prefix; one that lies within private, loopback or link-local space names it.
        ports: TCP (or UDP) ports; `ALL_PORTS` for all.
        protocol: "tcp" or "udp".
        addresses: Special addresses that `host` may have; others that are not public are refused.
        tls: "" wants the name in the clear (SNI), "any" also takes hellos without one, "strict" also
            refuses encrypted hellos (ECH), which may ask for another name inside.
    """

    host: str = ""
    cidr: Network | None = None
    ports: tuple[int, ...] = DEFAULT_PORTS
    protocol: Protocol = "tcp"
    addresses: tuple[Network, ...] = ()
    tls: Tls = ""

    def __str__(self) -> str:
        ports = "*" if self.ports == ALL_PORTS else ",".join(map(str, self.ports))
        scheme = "udp://" if self.protocol == "udp" else ""
        target = self.host or (f"[{self.cidr}]" if self.cidr and self.cidr.version == 6 else str(self.cidr))
        return f"{scheme}{target}:{ports}"

    def has_port(self, port: int) -> bool:
        """Whether it is for `port`."""
        return port in self.ports or self.ports == ALL_PORTS

    def covers(self, address: Address) -> bool:
        """Whether its prefix covers `address`, special ones only if the prefix names them."""
        if self.cidr is None or address.version != self.cidr.version or address not in self.cidr:
            return False
        return not special_kind(address) or _names(self.cidr, address)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a box may use of its network; 0 means no limit."""

    connections: int = 256
    new_per_second: int = 50
    bytes_per_second: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a box may reach; denials come first, all else is denied; `learn` allows what is public."""

    enabled: bool = False
    allow: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()
    host_ports: tuple[int, ...] = ()
    limits: Limits = field(default_factory=Limits)
    learn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether, by which rule, and why; `reason` is a sentence for people that names the cure."""

    allowed: bool
    rule: str = ""
    reason: str = ""
    matched: Rule | None = None


def make_rule(
    *,
    host: str = "",
    cidr: str = "",
    ports: Iterable[int] = (),
    protocol: str = "tcp",
    addresses: Iterable[str] = (),
    tls: str = "",
) -> Rule:
    """A checked rule.

    Raises:
        ValueError: a part that cannot be; the message says which.
    """
    if bool(host) == bool(cidr):
        raise ValueError("a rule needs a host or a cidr, and not both")
    if protocol not in ("tcp", "udp"):
        raise ValueError(f"protocol {protocol!r} is not tcp or udp")
    if tls not in ("", "any", "strict"):
        raise ValueError(f"tls {tls!r} is not any or strict")
    numbers = tuple(dict.fromkeys(ports)) or DEFAULT_PORTS
    if numbers != ALL_PORTS:
        for port in numbers:
            if not 1 <= port <= 65535:
                raise ValueError(f"port {port} is not 1 to 65535")
    if cidr and addresses:
        raise ValueError("addresses belong to a host")
    return Rule(
        host=normalize_pattern(host) if host else "",
        cidr=ip_network(cidr) if cidr else None,
        ports=numbers,
        protocol="udp" if protocol == "udp" else "tcp",
        addresses=tuple(ip_network(each) for each in addresses),
        tls="any" if tls == "any" else "strict" if tls == "strict" else "",
    )


def decide_name(policy: Policy, name: str) -> Decision:
    """Whether a DNS question for a normal `name` is answered."""
    for rule in policy.deny:
        if rule.host and matches(rule.host, name) and rule.ports in (ALL_PORTS, DEFAULT_PORTS):
            return Decision(allowed=False, rule=f"deny {rule}", reason=f"{name} is denied by {rule}")
    for rule in policy.allow:
        if rule.host and matches(rule.host, name):
            return Decision(allowed=True, rule=f"allow {rule}", matched=rule)
    if policy.learn:
        return Decision(allowed=True, rule="learn")
    return Decision(allowed=False, rule="default", reason=f"no rule allows {name}; add it to {KEY}")


def allowed_address(policy: Policy, name: str, address: Address, *, own: bool = False) -> Decision:
    """Whether a name that is allowed may have this address; rebinding ends here.

    Args:
        policy: The box's.
        name: A normal name.
        address: One that the name server gave for it.
        own: Whether it is one of the host's own.
    """
    kind = special_kind(address) or ("the host's own" if own else "")
    if not kind:
        return Decision(allowed=True)
    for rule in policy.allow:
        if rule.host and matches(rule.host, name) and _within(address, rule.addresses):
            return Decision(allowed=True, rule=f"allow {rule}", matched=rule)
        if rule.cidr is not None and rule.covers(address) and _names(rule.cidr, address):
            return Decision(allowed=True, rule=f"allow {rule}", matched=rule)
    reason = (
        f"{name} is at {address}, which is {kind}; name it if that is meant: "
        f"{{host: {name}, addresses: [{address}]}}"
    )
    return Decision(allowed=False, rule="special addresses", reason=reason)


def decide(
    policy: Policy,
    address: Address,
    port: int,
    *,
    names: Collection[str] = (),
    claimed: str = "",
    own: bool = False,
    protocol: Protocol = "tcp",
) -> Decision:
    """Whether the box may talk to `address` and `port`.

    Args:
        policy: The box's.
        address: Where the connection goes.
        port: Its port.
        names: Names that the box's name server has given this address for.
        claimed: The name in the connection itself (SNI or Host), normal; empty if there is none.
        own: Whether the address is one of the host's own.
        protocol: "tcp" or "udp".
    """
    seen = [claimed] if claimed else [*names]
    for rule in policy.deny:
        if rule.has_port(port) and (
            any(rule.host and matches(rule.host, name) for name in {*seen, *names})
            or (rule.cidr is not None and address.version == rule.cidr.version and address in rule.cidr)
        ):
            return Decision(allowed=False, rule=f"deny {rule}", reason=f"denied by {rule}")
    kind = special_kind(address) or ("the host's own" if own else "")
    refused: Decision | None = None
    for name in seen:
        if claimed and claimed not in names:
            break  # the box picked the address itself; only a prefix can allow that
        for rule in policy.allow:
            if rule.protocol != protocol or not rule.host or not rule.has_port(port):
                continue
            if not matches(rule.host, name):
                continue
            one = allowed_address(policy, name, address, own=own)
            if one.allowed:
                return Decision(allowed=True, rule=f"allow {rule}", matched=rule)
            refused = one
    for rule in policy.allow:
        if rule.protocol == protocol and rule.has_port(port) and rule.covers(address):
            if own and rule.cidr is not None and not _names(rule.cidr, address):
                continue
            return Decision(allowed=True, rule=f"allow {rule}", matched=rule)
    if policy.learn and not kind:
        return Decision(allowed=True, rule="learn")
    if refused is not None:
        return refused
    return Decision(
        allowed=False, rule="default", reason=_why(policy, address, port, seen, names, claimed, kind)
    )


def _why(
    policy: Policy,
    address: Address,
    port: int,
    seen: Collection[str],
    names: Collection[str],
    claimed: str,
    kind: str,
) -> str:
    if kind:
        return f"{address} is {kind}; only a rule that names it allows that: add {address}:{port} to {KEY}"
    if claimed and claimed not in names and decide_name(policy, claimed).allowed:
        return f"{address} is not an address of {claimed} that the box's name server gave"
    target = next(iter(sorted(seen)), str(address))
    if any(decide_name(policy, name).allowed for name in seen):
        return f"no rule allows port {port} of {target}; add {target}:{port} to {KEY}"
    return f"no rule allows {target}; add {target}:{port} to {KEY}"


def _within(address: Address, networks: Iterable[Network]) -> bool:
    return any(
        address.version == network.version and address in network and _names(network, address)
        for network in networks
    )


def _names(network: Network, address: Address) -> bool:
    """Whether a prefix means a special address that it covers; metadata has to be named by itself."""
    if special_kind(address) == METADATA:
        return network.num_addresses == 1
    return is_special(network) or network.num_addresses == 1
