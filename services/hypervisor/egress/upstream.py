"""From the gateway to the world: directly, or by the host's HTTP or SOCKS5 proxy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from urllib.parse import unquote, urlsplit

from services.common.egress.addresses import Address, parse_address

CONNECT_SECONDS = 15.0
"""For one address; Linux itself would try for two minutes."""
KEEPALIVE_SECONDS = 120
_MAX_REPLY = 8192
_SOCKS_ERRORS = {
    1: "general failure",
    2: "not allowed by its rules",
    3: "network unreachable",
    4: "host unreachable",
    5: "connection refused",
    6: "time-out",
    7: "command not supported",
    8: "address type not supported",
}


@dataclass(frozen=True, slots=True)
class Proxy:
    """An upstream proxy: "http" (CONNECT) or "socks5" (RFC 1928)."""

    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = field(default="", repr=False)


def parse_proxy(url: str) -> Proxy | None:
    """The proxy of a URL, e.g. `http://user:password@proxy.example:3128`; None for an empty one.

    Raises:
        ValueError: it is not one.
    """
    if not url:
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    scheme = {"socks5h": "socks5", "socks": "socks5"}.get(parts.scheme, parts.scheme)
    if scheme not in ("http", "socks5") or not parts.hostname:
        raise ValueError(f"proxy {parts.scheme}://{parts.hostname or ''} is neither http:// nor socks5://")
    return Proxy(
        scheme,
        parts.hostname,
        parts.port or (3128 if scheme == "http" else 1080),
        unquote(parts.username or ""),
        unquote(parts.password or ""),
    )


class NoProxy:
    """What goes directly: names with all below them, addresses and prefixes, "*" for everything."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._names: list[str] = []
        self._networks = []
        for entry in (each.strip().lower() for each in entries):
            try:
                self._networks.append(ip_network(entry))
            except ValueError:
                if entry:
                    self._names.append(entry.lstrip("*").lstrip("."))

    def covers(self, name: str, address: Address | None) -> bool:
        """Whether a connection to this name, or this address, goes directly."""
        if "" in self._names:
            return True
        if name and any(name == each or name.endswith(f".{each}") for each in self._names):
            return True
        return address is not None and any(
            address.version == network.version and address in network for network in self._networks
        )


async def connect(address: str, port: int) -> socket.socket:
    """A connected socket that does not block, without delay of small pieces and with keep-alive.

    Raises:
        OSError: it cannot be reached.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setblocking(False)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
        async with asyncio.timeout(CONNECT_SECONDS):
            await asyncio.get_running_loop().sock_connect(one, (address, port))
    except TimeoutError as error:
        one.close()
        raise OSError(f"{address} port {port} does not answer within {CONNECT_SECONDS:g} s") from error
    except BaseException:
        one.close()
        raise
    return one


async def connect_by(proxy: Proxy, addresses: Sequence[str], target: str, port: int) -> socket.socket:
    """A connection to `target` through a proxy that is at one of `addresses`.

    Raises:
        OSError: the proxy cannot be reached, or refuses.
    """
    problem: OSError = OSError(f"proxy {proxy.host} has no address")
    for address in addresses:
        try:
            one = await connect(address, proxy.port)
        except OSError as error:
            problem = error
            continue
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await (_http if proxy.scheme == "http" else _socks)(one, proxy, target, port)
        except TimeoutError as error:
            one.close()
            raise OSError(f"proxy {proxy.host} does not answer within {CONNECT_SECONDS:g} s") from error
        except BaseException:
            one.close()
            raise
        return one
    raise problem


async def _http(one: socket.socket, proxy: Proxy, target: str, port: int) -> None:
    where = f"[{target}]:{port}" if ":" in target else f"{target}:{port}"
    lines = [f"CONNECT {where} HTTP/1.1", f"Host: {where}"]
    if proxy.user:
        token = b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {token}")
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(one, ("\r\n".join(lines) + "\r\n\r\n").encode())
    reply = b""
    # Byte by byte: what comes after the head is the target's already, and a server may speak first.
    while not reply.endswith(b"\r\n\r\n"):
        piece = await loop.sock_recv(one, 1)
        if not piece or len(reply) > _MAX_REPLY:
            raise OSError(f"proxy {proxy.host} ended the connection instead of an answer")
        reply += piece
    words = reply.split(b"\r\n", 1)[0].split(b" ", 2)
    if len(words) < 2 or not words[1].startswith(b"2"):
        status = b" ".join(words[1:]).decode("latin-1")[:80]
        raise OSError(f"proxy {proxy.host} refuses {where}: {status}")


async def _socks(one: socket.socket, proxy: Proxy, target: str, port: int) -> None:
    loop = asyncio.get_running_loop()

    async def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = await loop.sock_recv(one, count - len(data))
            if not piece:
                raise OSError(f"proxy {proxy.host} ended the connection instead of an answer")
            data += piece
        return data

    await loop.sock_sendall(one, b"\x05\x02\x00\x02" if proxy.user else b"\x05\x01\x00")
    version, method = await exactly(2)
    if version != 5 or method == 0xFF:
        raise OSError(f"proxy {proxy.host} wants another way to log in")
    if method == 2:  # RFC 1929
        user, password = proxy.user.encode()[:255], proxy.password.encode()[:255]
        await loop.sock_sendall(one, bytes([1, len(user)]) + user + bytes([len(password)]) + password)
        if (await exactly(2))[1] != 0:
            raise OSError(f"proxy {proxy.host} refuses the user name or password")
    with contextlib.suppress(ValueError):
        packed = parse_address(target).packed
        await loop.sock_sendall(
            one,
            b"\x05\x01\x00" + (b"\x01" if len(packed) == 4 else b"\x04") + packed + struct.pack("!H", port),
        )
        return await _socks_reply(exactly, proxy, target)
    name = target.encode()
    await loop.sock_sendall(one, b"\x05\x01\x00\x03" + bytes([len(name)]) + name + struct.pack("!H", port))
    return await _socks_reply(exactly, proxy, target)


async def _socks_reply(exactly, proxy: Proxy, target: str) -> None:  # type: ignore[no-untyped-def]
    _, code, _, kind = await exactly(4)
    length = {1: 4, 4: 16}.get(kind)
    if length is None:
        length = (await exactly(1))[0]
    await exactly(length + 2)
    if code:
        raise OSError(f"proxy {proxy.host} refuses {target}: {_SOCKS_ERRORS.get(code, f'error {code}')}")
