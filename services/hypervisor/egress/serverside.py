"""The connections to the server behind one connection of a box.

They serve that one connection only, so that what a box may do is decided per connection, and a server
that mixes connections up does so with one box's data.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Final

import h11

from services.hypervisor.egress.flow import Dial, Flow
from services.hypervisor.egress.http1 import Http1Client
from services.hypervisor.egress.http2 import Http2Client
from services.hypervisor.egress.message import HttpError, Request, Response
from services.hypervisor.egress.stream import PlainStream, Stream, StreamError, connect_tls

_KEPT_IDLE: Final = 4


def trust(extra: bytes = b"", *, http2: bool = True) -> ssl.SSLContext:
    """The host's trust store and the PEM certificates `extra`; what servers are checked against.

    Args:
        http2: Whether that is offered; a WebSocket needs HTTP/1.1.
    """
    context = ssl.create_default_context()
    if extra:
        context.load_verify_locations(cadata=extra.decode("ascii"))
    context.set_alpn_protocols(["h2", "http/1.1"] if http2 else ["http/1.1"])
    return context


class Upstream:
    """Sends requests to the server of `flow`.

    Args:
        tls: What the server is checked against, and the same for HTTP/1.1; None for plain HTTP.
    """

    def __init__(self, flow: Flow, name: str, dial: Dial, tls: tuple[ssl.SSLContext, ssl.SSLContext] | None):
        self._flow = flow
        self._name = name
        self._dial = dial
        self._tls = tls
        self._idle: list[Http1Client] = []
        self._session: Http2Client | None = None
        self._clients: set[Http1Client | Http2Client] = set()
        self._opening = asyncio.Lock()
        self._http1 = tls is None

    async def send(self, request: Request) -> Response:
        """Send one request.

        Raises:
            HttpError: the server cannot be reached, does not prove to be who it should, or breaks HTTP.
        """
        try:
            while True:
                client = await self._client(request.websocket)
                if isinstance(client, Http2Client):
                    return await client.send(request)
                try:
                    return await client.send(request, self._finished)
                except StreamError:
                    self._clients.discard(client)
                    # The server closed an idle connection just now; that says nothing about the request.
                    if not client.reused or request.has_body:
                        raise
        except OSError as error:  # StreamError, or from dialling
            raise HttpError(502, f"{self._name} cannot be reached: {error}", reason="UPSTREAM") from error
        except (h11.RemoteProtocolError, h11.LocalProtocolError) as error:
            raise HttpError(502, f"{self._name} broke HTTP: {error}", reason="UPSTREAM") from error

    async def _client(self, websocket: bool) -> Http1Client | Http2Client:
        while self._idle and not websocket:
            client = self._idle.pop()
            if client.usable():
                return client
            await self._end(client)
        if websocket or self._http1:
            return await self._open(websocket)
        async with self._opening:  # so that a burst of streams makes one connection
            if self._session is not None and self._session.usable():
                return self._session
            opened = await self._open(websocket)
            if isinstance(opened, Http2Client):
                self._session = opened
            else:
                self._http1 = True
            return opened

    async def _open(self, websocket: bool) -> Http1Client | Http2Client:
        sock = await self._dial(self._flow)
        stream: Stream
        if self._tls is None:
            stream = PlainStream(sock)
        else:
            stream = await connect_tls(sock, self._tls[websocket], self._name)
        if stream.alpn == "h2":
            session = Http2Client(stream)
            self._clients.add(session)
            await session.start()
            return session
        client = Http1Client(stream)
        self._clients.add(client)
        return client

    async def _finished(self, client: Http1Client) -> None:
        if len(self._idle) < _KEPT_IDLE and client.usable():
            self._idle.append(client)
        else:
            await self._end(client)

    async def _end(self, client: Http1Client) -> None:
        self._clients.discard(client)
        await client.close()

    async def close(self) -> None:
        """Close all connections."""
        left = list(self._clients)
        self._clients.clear()
        self._idle.clear()
        try:
            while left:
                await left[-1].close()
                left.pop()
        finally:
            for client in left:  # the task was cancelled once more
                client.abort()
