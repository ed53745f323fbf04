"""The first message of a TLS client, as far as it says where it wants to go. Bytes in, facts out.

Sources: RFC 8446 §4.1.2 and §5.1, RFC 6066 §3 (server_name), RFC 7301 (ALPN), RFC 9849 (ECH).
"""

from __future__ import annotations

from dataclasses import dataclass

from services.common.egress.names import normalize

MAX_HELLO = 64 << 10
"""Post-quantum key shares make hellos of 2 KiB; nobody's is near this."""
ACCESS_DENIED = bytes.fromhex("15030300020231")
"""A fatal alert `access_denied` (RFC 8446 §6.2) as a plaintext record."""
_RECORD, _HELLO = 22, 1
_MAX_RECORD = (1 << 14) + 256
_SERVER_NAME, _ALPN, _ECH = 0, 16, 0xFE0D


class BadHello(ValueError):
    """It starts like TLS and is not."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What a hello asks for: a normal name (empty: none), protocols, and whether it hides another hello."""

    sni: str
    alpn: tuple[str, ...] = ()
    encrypted: bool = False


def is_tls(data: bytes) -> bool:
    """Whether bytes, at least one, can be the begin of a TLS connection."""
    return data[0] == _RECORD and (len(data) < 2 or data[1] == 3)


def parse_hello(data: bytes) -> Hello | None:
    """The hello that `data` begins with; None if more bytes are needed.

    Raises:
        BadHello: it is not one, or too long.
    """
    handshake = b""
    at = 0
    while True:
        if len(handshake) >= 4:
            if handshake[0] != _HELLO:
                raise BadHello("the first message is no ClientHello")
            length = int.from_bytes(handshake[1:4], "big")
            if length > MAX_HELLO:
                raise BadHello(f"a ClientHello of {length} bytes")
            if len(handshake) >= 4 + length:
                return _parse_body(_Reader(handshake[4 : 4 + length]))
        if at > MAX_HELLO + 1024:
            raise BadHello("a ClientHello in too many records")
        if len(data) < at + 5:
            return None
        size = int.from_bytes(data[at + 3 : at + 5], "big")
        if data[at] != _RECORD or data[at + 1] != 3 or not 0 < size <= _MAX_RECORD:
            raise BadHello("a record that belongs to no ClientHello")
        part = data[at + 5 : at + 5 + size]
        handshake += part
        at += 5 + len(part)
        if len(part) < size and (
            len(handshake) < 4 or len(handshake) < 4 + int.from_bytes(handshake[1:4], "big")
        ):
            return None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise BadHello("it ends within a field")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> _Reader:
        """What a length of `size` bytes says."""
        return _Reader(self.take(self.number(size)))


def _parse_body(body: _Reader) -> Hello:
    body.take(2 + 32)
    body.vector(1)
    body.vector(2)
    body.vector(1)
    sni, encrypted = "", False
    alpn: tuple[str, ...] = ()
    if body.left:
        extensions = body.vector(2)
        if body.left:
            raise BadHello("bytes after the extensions")
        seen: set[int] = set()
        while extensions.left:
            kind = extensions.number(2)
            content = extensions.vector(2)
            if kind in seen:
                raise BadHello(f"extension {kind} is there twice")
            seen.add(kind)
            if kind == _SERVER_NAME:
                sni = _server_name(content)
            elif kind == _ALPN:
                alpn = _protocols(content)
            elif kind == _ECH:
                encrypted = True
    return Hello(sni, alpn, encrypted)


def _server_name(content: _Reader) -> str:
    names = content.vector(2)
    if names.number(1) != 0:
        raise BadHello("a server name that is no host name")
    text = names.vector(2)
    if names.left or content.left:
        raise BadHello("more than one server name")
    try:
        return normalize(text.take(text.left).decode("ascii"))
    except ValueError as error:
        raise BadHello(f"server name: {error}") from error


def _protocols(content: _Reader) -> tuple[str, ...]:
    names = content.vector(2)
    found = []
    while names.left:
        one = names.vector(1)
        found.append(one.take(one.left).decode("latin-1"))
    return tuple(found)
