"""The addresses of the link between a box and its gateway: the same for all, each being alone on its own."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

TAP = "tap0"
GATEWAY = IPv4Interface("10.0.2.2/24")
GATEWAY6 = IPv6Interface("fd00:0:0:2::2/64")
GUEST = IPv4Interface("10.0.2.15/24")
GUEST6 = IPv6Interface("fd00:0:0:2::15/64")
NAME_SERVER = IPv4Address("10.0.2.3")
NAME_SERVER6 = IPv6Address("fd00:0:0:2::3")
GATEWAY_MAC = "52:55:0a:00:02:02"
GUEST_MAC = "52:54:00:12:34:56"
HOST_NAMES = ("host.voidbox.internal", "host.docker.internal")
"""Names of `GATEWAY`, where declared ports of the host are."""
