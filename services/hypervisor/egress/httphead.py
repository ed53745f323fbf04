"""Requests of an HTTP/1 connection, as far as they say where they want to go. Bytes in, hosts out.

Every request of a connection is looked at, since each may name another host; what follows an upgrade is not
HTTP any more. What could be read in two ways (RFC 9112 §6.3) is refused. Sources: RFC 9110 §7.2, RFC 9112.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.common.egress.addresses import parse_address
from services.common.egress.names import normalize

MAX_HEAD = 64 << 10
_METHOD = re.compile(rb"[A-Z][A-Z-]{1,19} ")
_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (\S+) HTTP/1\.([01])")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\r\n]*)?")


class BadHead(ValueError):
    """It starts like HTTP/1 and is not, or is ambiguous."""


@dataclass(frozen=True, slots=True)
class Head:
    """One request: a normal name or an address in `host`, empty if it names none."""

    method: str
    target: str
    host: str
    port: int | None
    upgrade: bool


def is_http(data: bytes) -> bool:
    """Whether bytes, at least one, can be the begin of an HTTP/1 request."""
    if data[:4] == b"PRI "[: len(data)] and len(data) >= 3:
        return False  # HTTP/2 without TLS (RFC 9113 §3.4)
    found = _METHOD.match(data[:21])
    return bool(found) or (len(data) < 21 and data.isalpha() and data.isupper())


class Requests:
    """The requests of one connection."""

    def __init__(self) -> None:
        self._buffer = b""
        self._body = 0
        self._chunked = False
        self._trailer = False
        self.opaque = False
        """What comes is not HTTP any more: after an upgrade or CONNECT that was sent."""

    def feed(self, data: bytes) -> list[Head]:
        """The heads that end within `data`.

        Raises:
            BadHead: the connection cannot be understood any more.
        """
        heads: list[Head] = []
        if self.opaque:
            return heads
        self._buffer += data
        while self._buffer and not self.opaque:
            if self._body:
                taken = min(self._body, len(self._buffer))
                self._buffer = self._buffer[taken:]
                self._body -= taken
                continue
            if self._chunked:
                if not self._next_chunk():
                    break
                continue
            # RFC 9112 §2.2: an empty line before a request is ignored.
            self._buffer = self._buffer.removeprefix(b"\r\n")
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD:
                    raise BadHead("a head of more than 64 KiB")
                break
            text, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            heads.append(self._head(text))
        return heads

    def _next_chunk(self) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                raise BadHead("a chunk's line of more than 64 KiB")
            return False
        line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        if self._trailer:
            if not line:
                self._chunked = self._trailer = False
            return True
        found = _CHUNK.fullmatch(line)
        if found is None:
            raise BadHead("a chunk without a length")
        size = int(found[1], 16)
        if size:
            self._body = size + 2
        else:
            self._trailer = True
        return True

    def _head(self, text: bytes) -> Head:
        lines = text.split(b"\r\n")
        first = _LINE.fullmatch(lines[0])
        if first is None:
            raise BadHead("a first line that is none of HTTP/1")
        fields: dict[bytes, list[bytes]] = {}
        for line in lines[1:]:
            found = _FIELD.fullmatch(line)
            if found is None or b"\n" in line or b"\r" in line or b"\0" in line:
                raise BadHead("a header line that is none")
            fields.setdefault(found[1].lower(), []).append(found[2])
        self._framing(fields)
        method, target = first[1].decode(), first[2].decode("latin-1")
        named = fields.get(b"host", [])
        if len(named) > 1:
            raise BadHead("two Host headers")
        host, port = _host(named[0].decode("latin-1")) if named and named[0] else ("", None)
        if method == "CONNECT":
            host, port = _host(target)
        elif "://" in target:
            inside = target.partition("://")[2].partition("/")[0].partition("?")[0]
            absolute, port = _host(inside)
            if host and absolute != host:
                raise BadHead("the target names another host than Host")
            host = absolute
        upgrade = b"upgrade" in fields or method == "CONNECT"
        self.opaque = self.opaque or upgrade
        return Head(method, target, host, port, upgrade)

    def _framing(self, fields: dict[bytes, list[bytes]]) -> None:
        lengths, codings = fields.get(b"content-length", []), fields.get(b"transfer-encoding", [])
        if codings:
            if lengths or len(codings) > 1 or codings[0].lower() != b"chunked":
                raise BadHead("a body of unclear length")
            self._chunked = True
        elif lengths:
            if len(set(lengths)) > 1 or not re.fullmatch(rb"[0-9]{1,18}", lengths[0]):
                raise BadHead("a body of unclear length")
            self._body = int(lengths[0])


def _host(text: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/\\]+)(?::([0-9]{1,5}))?", text)
    if found is None:
        raise BadHead(f"{text[:80]!r} is no host")
    name, port = found[1], int(found[2]) if found[2] else None
    try:
        return str(parse_address(name.strip("[]"))), port
    except ValueError:
        pass
    try:
        return normalize(name), port
    except ValueError as error:
        raise BadHead(str(error)) from error


def refusal(reason: str, status: str = "403 Forbidden") -> bytes:
    """An answer that says why, and ends the connection."""
    body = f"voidbox: {reason}\n".encode()
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\nX-Voidbox-Denied: 1\r\n\r\n"
    ).encode() + body
