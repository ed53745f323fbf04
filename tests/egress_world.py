"""The world that boxes of the tests look out at: name server, web servers, all on this machine's loopback.

Every server tells whether it was reached by what must not reach it: `forbidden` holds what it heard then.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

WORD = "the-forbidden-word"
ALLOWED = ("ok.test", "strict.test")


def own_address() -> str:
    """An address of this machine that is not a loopback one; nothing is sent to find it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect(("192.0.2.1", 9))
        return str(one.getsockname()[0])
    return "127.0.0.1"


@dataclass
class World:
    """Ports of the servers, and what they heard."""

    dns_port: int
    http_port: int
    tls_port: int
    forbidden_port: int
    questions: list[str] = field(default_factory=list)
    forbidden: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)


class _Names(asyncio.DatagramProtocol):
    """A name server for a table of (name, type) to texts."""

    def __init__(self, table: Mapping[tuple[str, str], Sequence[str]], asked: list[str]) -> None:
        self._table = table
        self._asked = asked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.DatagramTransport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(question.rdtype)
        self._asked.append(name)
        answer = dns.message.make_response(query)
        owner = name
        for target in self._table.get((name, "CNAME"), ()):
            answer.answer.append(dns.rrset.from_text(f"{owner}.", 60, "IN", "CNAME", f"{target}."))
            owner = target
        if texts := self._table.get((owner, kind)):
            answer.answer.append(dns.rrset.from_text(f"{owner}.", 60, "IN", kind, *texts))
        elif not any(other == owner for other, _ in self._table):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self._transport.sendto(answer.to_wire(), addr)


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    """The servers while the block runs."""
    host = own_address()
    table = {
        ("ok.test", "A"): ["127.0.0.1"],
        ("strict.test", "A"): ["127.0.0.1"],
        ("denied.test", "A"): ["127.0.0.1"],
        ("rebinding.test", "A"): [host],
        ("alias.test", "CNAME"): ["ok.test"],
        ("inside.test", "CNAME"): ["deep.inside.test"],
        ("deep.inside.test", "A"): ["10.99.0.1"],
        ("tunnel.test", "A"): ["127.0.0.1"],
    }
    heard = World(0, 0, 0, 0)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Names(table, heard.questions), local_addr=("127.0.0.1", 0)
    )
    heard.dns_port = transport.get_extra_info("sockname")[1]

    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                named = [
                    line for line in head.decode("latin-1").split("\r\n") if line.lower().startswith("host:")
                ]
                host = named[-1].partition(":")[2].strip().partition(":")[0] if named else ""
                heard.hosts.append(host)
                good = host in ALLOWED or host == "10.0.2.2"
                if not good:
                    heard.forbidden.append(head.decode("latin-1"))
                body = f"hello {host}" if good else WORD
                if b"chunked" in head.lower():
                    await reader.readuntil(b"0\r\n\r\n")
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                await writer.drain()
                if b"connection: close" in head.lower():
                    break
        writer.close()

    async def canary(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            data = await reader.read(4096)
            if data:
                heard.hosts.append("raw")
                writer.write(WORD.encode())
                await writer.drain()
        writer.close()

    async def trap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.forbidden.append(str(writer.get_extra_info("sockname")))
        with contextlib.suppress(ConnectionError):
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(WORD)}\r\n\r\n{WORD}".encode())
            await writer.drain()
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        stack.callback(transport.close)
        for name, serve, where in (
            ("http_port", web, "127.0.0.1"),
            ("tls_port", canary, "127.0.0.1"),
            ("forbidden_port", trap, "0.0.0.0"),
        ):
            server = await stack.enter_async_context(await asyncio.start_server(serve, where, 0))
            setattr(heard, name, server.sockets[0].getsockname()[1])
        yield heard
