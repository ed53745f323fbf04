"""A rule as people write it on one line: `[udp://]NAME|ADDRESS|PREFIX[:PORT,…|:*]`."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any


def parse_rule(text: str) -> dict[str, Any]:
    """The parts of a rule, for `policy.make_rule`.

    Raises:
        ValueError: it is none.
    """
    protocol, rest = "tcp", text.strip()
    for scheme in ("tcp", "udp"):
        if rest.startswith(f"{scheme}://"):
            protocol, rest = scheme, rest.removeprefix(f"{scheme}://")
    if "://" in rest or "/" in rest.partition("/")[2] or "@" in rest:
        raise ValueError(
            f"{text[:80]!r} is a URL; a rule is a name or prefix and ports, like example.com:443"
        )
    if rest.startswith("["):
        target, bracket, ports = rest[1:].partition("]")
        if not bracket or (ports and ports[0] != ":"):
            raise ValueError(f"{text[:80]!r}: an IPv6 address with ports is written [address]:ports")
        ports = ports[1:]
    elif rest.count(":") > 1:
        target, ports = rest, ""
    else:
        target, _, ports = rest.partition(":")
        if rest.endswith(":"):
            raise ValueError(f"{text[:80]!r}: no port after the colon")
    numbers: tuple[int, ...] = ()
    if ports == "*":
        numbers = (0,)
    elif ports:
        if not all(each.strip().isdecimal() and len(each.strip()) < 6 for each in ports.split(",")):
            raise ValueError(f"{text[:80]!r}: ports are numbers with commas between, or *")
        numbers = tuple(int(each) for each in ports.split(","))
    try:
        ip_network(target, strict=False)
    except ValueError:
        return {"host": target, "ports": numbers, "protocol": protocol}
    return {"cidr": target, "ports": numbers, "protocol": protocol}
