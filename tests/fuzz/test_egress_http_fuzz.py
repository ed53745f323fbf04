"""Whatever a box sends as HTTP, its connection is answered or ended, and no other connection notices.

The head is never passed on: what reaches the handler is a request for one host, without line breaks.
"""

from __future__ import annotations

import asyncio
import socket

from hypothesis import given, settings
from hypothesis import strategies as st

from services.hypervisor.egress.http1 import serve_http1
from services.hypervisor.egress.http2 import Http2Server
from services.hypervisor.egress.message import Request, Response, plain_response
from services.hypervisor.egress.stream import PlainStream

_PARTS = [
    b"GET / HTTP/1.1\r\n",
    b"POST http://a.test/x HTTP/1.1\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"Host: a.test\r\n",
    b"Host: b.test\r\n",
    b"Content-Length: 3\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: -1\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Connection: close, host\r\n",
    b"Expect: 100-continue\r\n",
    b"Upgrade: websocket\r\n",
    b"X: y\r\n folded\r\n",
    b"X : y\r\n",
    b"\r\n",
    b"\n",
    b"abc",
    b"3\r\nabc\r\n",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"\0",
    b"\xff" * 9,
    b"A" * 70000,
    b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"\x00\x00\x08\x06\x00\x00\x00\x00\x00abcdefgh",
    b"\x00\x00\x04\x01\x05\x00\x00\x00\x01\x82\x87\x84\x81",
    b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x7f\xff\xff\xff",
    b"\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x08",
    b"\x00\x00\x03\x00\x01\x00\x00\x00\x01abc",
]
_INPUT = st.lists(st.one_of(st.sampled_from(_PARTS), st.binary(max_size=40)), max_size=12)


async def _serve(parts: list[bytes], http2: bool) -> list[Request]:
    seen: list[Request] = []

    async def handler(request: Request) -> Response:
        seen.append(request)
        async for _ in request.body:
            pass
        return plain_response(200, "ok")

    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        stream = PlainStream(ours)
        work = Http2Server(stream, handler).serve() if http2 else serve_http1(stream, handler)
        server = asyncio.create_task(work)
        loop = asyncio.get_running_loop()
        reader = asyncio.create_task(_read(theirs))
        try:
            for part in parts:
                await loop.sock_sendall(theirs, part)
            theirs.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has ended the connection already
        async with asyncio.timeout(120):
            await server
        await reader
    return seen


async def _read(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    try:
        while await loop.sock_recv(sock, 65536):
            pass
    except OSError:
        pass


@settings(deadline=None, max_examples=150)
@given(parts=_INPUT, http2=st.booleans())
def test_any_bytes_end_in_an_answer_or_a_closed_connection(parts: list[bytes], http2: bool) -> None:
    with asyncio.Runner() as runner:
        for request in runner.run(_serve(parts, http2)):
            for text in (request.method, request.target, request.authority):
                assert "\r" not in text
                assert "\n" not in text
                assert "\0" not in text
            for name, value in request.headers:
                assert name == name.lower()
                assert not {10, 13, 0} & {*name, *value}
            assert not {b"transfer-encoding", b"connection", b"host"} & {name for name, _ in request.headers}
