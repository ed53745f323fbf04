"""Name servers as people write them."""

from __future__ import annotations

import ipaddress


def parse_server(text: str) -> tuple[str, int]:
    """Address and port of a name server.

    Raises:
        ValueError: it is neither "ADDRESS" nor "ADDRESS:PORT" (IPv6 in brackets).
    """
    try:
        return str(ipaddress.ip_address(text)), 53
    except ValueError:
        host, _, port = text.rpartition(":")
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"name server {text!r} is neither ADDRESS nor ADDRESS:PORT") from None
        return str(ipaddress.ip_address(host.strip("[]"))), int(port)
