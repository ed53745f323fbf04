"""HTTP/1.1 to and from the neutral messages, by h11 (RFC 9112).

h11 parses and frames strictly, so two peers cannot be made to see different messages: what goes on
is written anew, never copied.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import h11

from services.hypervisor.egress.message import (
    MAX_HEAD_BYTES,
    Body,
    Handler,
    Headers,
    HttpError,
    Request,
    Response,
    close_body,
    end_to_end,
    get,
    nothing,
    plain_response,
    without,
)
from services.hypervisor.egress.stream import Stream, StreamError
from services.hypervisor.egress.websocket import relay

_T = TypeVar("_T")

# What is read of a body that nobody wanted, so that the connection can be kept.
_DRAIN_BYTES: Final = 256 << 10


class _Abandoned(Exception):
    """The client has gone; nobody waits for the response."""


class Reader:
    """Events of one connection; a read that is cancelled loses nothing."""

    def __init__(self, stream: Stream, connection: h11.Connection) -> None:
        self.stream = stream
        self.connection = connection
        self._reading: asyncio.Task[bytes] | None = None
        self.ended = False

    async def fill(self) -> None:
        """Read once."""
        if self._reading is None:
            self._reading = asyncio.create_task(self.stream.read())
        # Cancelled here, the read goes on, and what it brings is there for the next call.
        await asyncio.wait([self._reading])
        reading, self._reading = self._reading, None
        data = reading.result()
        self.ended = self.ended or not data
        self.connection.receive_data(data)

    async def event(self) -> h11.Event | type[h11.PAUSED]:
        """The next event.

        Raises:
            h11.RemoteProtocolError: the peer broke HTTP.
        """
        while True:
            event = self.connection.next_event()
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]
            if self.connection.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                await self.stream.write(self.connection.send(go_on) or b"")
            await self.fill()

    async def close(self) -> None:
        """Stop reading and close."""
        try:
            if self._reading is not None:
                self._reading.cancel()
                await asyncio.wait([self._reading])
        finally:
            self.stream.close()


async def serve_http1(stream: Stream, handler: Handler) -> None:
    """Answer the requests of one connection until it ends, then close it."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    reader = Reader(stream, connection)
    try:
        while await _serve_one(reader, handler):
            connection.start_next_cycle()
    except (StreamError, _Abandoned, h11.LocalProtocolError):
        pass
    finally:
        await reader.close()


async def _serve_one(reader: Reader, handler: Handler) -> bool:
    """One exchange; whether another can follow."""
    stream, connection = reader.stream, reader.connection
    try:
        event = await reader.event()
        if not isinstance(event, h11.Request):
            return False  # the end
        request, done = _request(reader, event)
    except h11.RemoteProtocolError as error:
        await _refuse(reader, error.error_status_hint or 400, f"This is not HTTP/1.1: {error}")
        return False
    except HttpError as error:
        await _refuse(reader, error.status, str(error))
        return False
    try:
        response = await _watched(reader, done, handler(request))
    except h11.RemoteProtocolError as error:
        await _refuse(reader, 400, f"This is not HTTP/1.1: {error}")
        return False
    except HttpError as error:
        response = plain_response(error.status, f"voidbox: {error}\n")
    try:
        if response.tunnel is not None:
            await _switch(reader, response)
            return False
        await _watched(reader, done, _send(stream, connection, response))
    finally:
        await close_body(response.body)
    with contextlib.suppress(h11.RemoteProtocolError):
        await _drain(reader)
    return connection.our_state is h11.DONE and connection.their_state is h11.DONE


def _request(reader: Reader, event: h11.Request) -> tuple[Request, asyncio.Event]:
    headers: Headers = [(bytes(name), bytes(value)) for name, value in event.headers]
    target, authority = event.target.decode("ascii"), (get(headers, b"host") or b"").decode("latin-1")
    scheme = "https" if reader.stream.secure else "http"
    if not target.startswith("/") and target != "*":
        # The absolute form (RFC 9112 §3.2.2) names the host once more; both must say the same.
        prefix = f"{scheme}://{authority}"
        if not target.lower().startswith(prefix.lower()) or not authority:
            raise HttpError(421, "the request names another host than its Host header", reason="AUTHORITY")
        target = target[len(prefix) :] or "/"
        if not target.startswith("/"):
            target = f"/{target}"
    upgrade = (get(headers, b"upgrade") or b"").lower()
    done = asyncio.Event()
    trailers: Headers = []
    request = Request(
        method=event.method.decode("ascii"),
        scheme=scheme,
        authority=authority,
        target=target,
        headers=without(end_to_end(headers), b"host", b"expect"),
        body=_incoming(reader, trailers, done),
        chunked=get(headers, b"transfer-encoding") is not None,
        trailers=trailers,
        websocket=upgrade == b"websocket",
    )
    if not request.has_body:
        done.set()
    return request, done


async def _incoming(reader: Reader, trailers: Headers, done: asyncio.Event | None) -> AsyncIterator[bytes]:
    while True:
        try:
            event = await reader.event()
        except h11.RemoteProtocolError as error:
            if done is not None:
                raise
            raise StreamError(f"the server's answer broke off: {error}") from error
        if isinstance(event, h11.Data):
            yield bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            trailers += end_to_end([(bytes(name), bytes(value)) for name, value in event.headers])
            if done is not None:
                done.set()
            return
        else:
            raise StreamError("the connection ended within a message")


async def _watched(reader: Reader, done: asyncio.Event, work: Coroutine[Any, Any, _T]) -> _T:
    """`work`, cancelled when the client hangs up after it has sent its request."""
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(reader, done))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise _Abandoned
        return worker.result()
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _gone(reader: Reader, done: asyncio.Event) -> None:
    await done.wait()
    buffered = 0
    while not reader.ended and buffered < MAX_HEAD_BYTES:
        before = len(reader.connection.trailing_data[0])
        try:
            await reader.fill()
        except StreamError:
            return
        buffered += len(reader.connection.trailing_data[0]) - before
    if buffered >= MAX_HEAD_BYTES or not reader.stream.secure:
        # Pipelined requests, or a plain client that has only closed its own direction.
        await asyncio.Event().wait()


async def _send(stream: Stream, connection: h11.Connection, response: Response) -> None:
    head = h11.Response(status_code=response.status, headers=end_to_end(response.headers))
    await stream.write(connection.send(head) or b"")
    async for chunk in response.body:
        if chunk:
            await stream.write(connection.send(h11.Data(data=chunk)) or b"")
    await stream.write(connection.send(h11.EndOfMessage(headers=response.trailers)) or b"")


async def _refuse(reader: Reader, status: int, text: str) -> None:
    if reader.connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    response = plain_response(status, f"voidbox: {text}\n")
    response.headers.append((b"connection", b"close"))
    head = h11.Response(status_code=status, headers=response.headers)
    data = reader.connection.send(head) or b""
    async for chunk in response.body:
        data += reader.connection.send(h11.Data(data=chunk)) or b""
    await reader.stream.write(data + (reader.connection.send(h11.EndOfMessage()) or b""))


async def _drain(reader: Reader) -> None:
    left = _DRAIN_BYTES
    while reader.connection.their_state is h11.SEND_BODY and left > 0:
        event = await reader.event()
        if isinstance(event, h11.Data):
            left -= len(event.data)


async def _switch(reader: Reader, response: Response) -> None:
    assert response.tunnel is not None
    upstream, rest = response.tunnel
    try:
        # The request has no body, but h11 wants to be told that it has ended.
        while reader.connection.their_state is h11.SEND_BODY:
            await reader.event()
        switch = [(b"connection", b"upgrade"), (b"upgrade", b"websocket")]
        headers = [*end_to_end(response.headers), *switch]
        accepted = h11.InformationalResponse(status_code=101, headers=headers)
        await reader.stream.write(reader.connection.send(accepted) or b"")
        first = bytes(reader.connection.trailing_data[0])
        await relay(reader.stream, first, upstream, rest, response.messages)
        async for _ in response.body:  # nothing comes, but its end is the WebSocket's
            pass
    finally:
        upstream.close()


class Http1Client:
    """One connection to a server, one exchange at a time. Owns the stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._reader = Reader(stream, self._connection)
        self.reused = False

    def usable(self) -> bool:
        """Whether another request can be sent on it."""
        return self._connection.our_state is h11.IDLE and not self._stream.stale()

    async def close(self) -> None:
        """Close the connection."""
        await self._reader.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._stream.close()

    async def send(self, request: Request, finished: Callable[[Http1Client], Awaitable[None]]) -> Response:
        """Send `request`; return once the head of the response is there.

        Args:
            finished: Told when the response has been read, or was abandoned.

        Raises:
            StreamError: the connection broke.
            h11.RemoteProtocolError: the server broke HTTP.
        """
        headers = [(b"host", request.authority.encode("latin-1")), *request.headers]
        if request.chunked:
            headers.append((b"transfer-encoding", b"chunked"))
        if request.websocket:
            headers += [(b"connection", b"upgrade"), (b"upgrade", b"websocket")]
        head = h11.Request(method=request.method, target=request.target, headers=headers)
        sender = None
        try:
            await self._stream.write(self._connection.send(head) or b"")
            sender = asyncio.create_task(self._send_body(request))
            while True:
                event = await self._reader.event()
                if isinstance(event, h11.Response):
                    break
                if isinstance(event, h11.InformationalResponse):
                    if event.status_code == 101 and request.websocket:
                        await sender
                        answer = [(bytes(name), bytes(value)) for name, value in event.headers]
                        tunnel = (self._stream, bytes(self._connection.trailing_data[0]))
                        return Response(status=101, headers=answer, body=nothing(), tunnel=tunnel)
                    continue
                raise StreamError("the server hung up before it answered")
        except BaseException:
            if sender is not None:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
            await self.close()
            raise
        trailers: Headers = []
        answer = [(bytes(name), bytes(value)) for name, value in event.headers]
        incoming = _incoming(self._reader, trailers, None)
        body = Body(incoming, lambda complete: self._done(complete, sender, finished))
        return Response(status=event.status_code, headers=answer, body=body, trailers=trailers)

    async def _done(
        self,
        complete: bool,
        sender: asyncio.Task[None],
        finished: Callable[[Http1Client], Awaitable[None]],
    ) -> None:
        if complete and sender.done() and not sender.cancelled() and sender.exception() is None:
            with contextlib.suppress(h11.LocalProtocolError):
                self._connection.start_next_cycle()
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)
        self.reused = True
        await finished(self)

    async def _send_body(self, request: Request) -> None:
        async for chunk in request.body:
            if chunk:
                await self._stream.write(self._connection.send(h11.Data(data=chunk)) or b"")
        end = h11.EndOfMessage(headers=request.trailers if request.chunked else [])
        await self._stream.write(self._connection.send(end) or b"")
