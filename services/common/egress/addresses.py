"""Kinds of addresses that no general rule allows: they must be named.

Sources: the IANA IPv4 and IPv6 special-purpose address registries (RFC 6890, RFC 8190); the clouds' metadata
services are link-local (169.254.169.254, RFC 3927) but for a few that have an address of their own.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

METADATA = "the cloud's metadata service"
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # First those within other kinds: AWS, Alibaba (100.100.100.200), Azure (168.63.129.16), Oracle, Google.
    (METADATA, ("169.254.169.254/32", "169.254.170.2/32", "fd00:ec2::254/128", "100.100.100.200/32",
                "168.63.129.16/32", "192.0.0.192/32", "fd20:ce::254/128")),
    ("loopback", ("127.0.0.0/8", "::1/128")),
    ("unspecified", ("0.0.0.0/8", "::/128")),
    ("private", ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fec0::/10")),
    ("shared by a provider (CGNAT)", ("100.64.0.0/10",)),
    ("link-local", ("169.254.0.0/16", "fe80::/10")),
    ("multicast", ("224.0.0.0/4", "ff00::/8")),
    ("reserved", ("192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4", "100::/64", "2001::/23",
                  "5f00::/16")),
    ("for documentation", ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32",
                           "3fff::/20")),
)  # fmt: skip
SPECIAL: tuple[tuple[str, Network], ...] = tuple(
    (kind, ip_network(text)) for kind, texts in _KINDS for text in texts
)
_NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))


def parse_address(text: str) -> Address:
    """The address that `text` means, an IPv4-mapped one as IPv4.

    Raises:
        ValueError: it is none. Forms that only inet_aton takes (octal, hex, one number) are none.
    """
    address = ip_address(text)
    if isinstance(address, IPv6Address):
        if address.scope_id:
            raise ValueError(f"{text!r} has a zone")
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
    return address


@lru_cache(maxsize=4096)
def special_kind(address: Address) -> str:
    """Why no general rule covers `address`, e.g. "loopback"; empty for one of the public Internet."""
    if isinstance(address, IPv6Address):
        inner = _embedded(address)
        if inner is not None and (kind := special_kind(inner)):
            return kind
    for kind, network in SPECIAL:
        if address.version == network.version and address in network:
            return kind
    return ""


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 one leads to: mapped, 6to4, Teredo, NAT64 or compatible."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in network for network in _NAT64) or int(address) >> 32 == 0:
        return IPv4Address(int(address) & 0xFFFFFFFF) if int(address) > 1 else None
    return None


def is_special(network: Network) -> bool:
    """Whether all of `network` is of one special kind, so that a rule with it names such addresses."""
    for _, other in SPECIAL:
        if isinstance(network, IPv4Network) and isinstance(other, IPv4Network) and network.subnet_of(other):
            return True
        if isinstance(network, IPv6Network) and isinstance(other, IPv6Network) and network.subnet_of(other):
            return True
    return False
