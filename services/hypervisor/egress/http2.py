"""HTTP/2 to and from the neutral messages, by h2 (RFC 9113).

What a peer may keep in memory here is bounded by the windows that it is given; a window opens again
only when the other side has taken the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

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
    plain_response,
    without,
)
from services.hypervisor.egress.stream import Stream, StreamError

log = logging.getLogger(__name__)

STREAM_WINDOW: Final = 256 << 10
CONNECTION_WINDOW: Final = 8 << 20
MAX_STREAMS: Final = 100
# Streams that a client has taken back before they were answered (CVE-2023-44487).
MAX_RESETS: Final = 1000


class _Channel:
    """One stream: what has come of it and what waits for it."""

    def __init__(self) -> None:
        self.head: asyncio.Future[Headers] = asyncio.get_running_loop().create_future()
        self.chunks: deque[tuple[bytes, int]] = deque()
        self.trailers: Headers = []
        self.ended = False
        self.error: StreamError | None = None
        self.news = asyncio.Event()
        self.window = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def fail(self, error: StreamError) -> None:
        self.error = self.error or error
        if not self.head.done():
            self.head.set_exception(error)
            self.head.exception()  # nobody may be waiting for it
        self.news.set()
        self.window.set()
        if self.task is not None:
            self.task.cancel()


class _Session:
    """One connection; `run` reads it."""

    def __init__(self, stream: Stream, *, client: bool) -> None:
        self._stream = stream
        self._client = client
        config = h2.config.H2Configuration(client_side=client, header_encoding=None)
        self._h2 = h2.connection.H2Connection(config=config)
        self._h2.local_settings = h2.settings.Settings(
            client=client,
            initial_values={
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEAD_BYTES,
                h2.settings.SettingCodes.ENABLE_PUSH: 0,
                h2.settings.SettingCodes.MAX_FRAME_SIZE: 16384,
            },
        )
        self._channels: dict[int, _Channel] = {}
        self._writing = asyncio.Lock()
        self.closed = False

    async def open(self) -> None:
        """Say the preface."""
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        await self._flush()

    async def run(self) -> None:
        """Read until the end; every stream that is open then fails."""
        reason = "the peer ended the HTTP/2 connection"
        try:
            while data := await self._stream.read():
                for event in self._h2.receive_data(data):
                    await self._dispatch(event)
                await self._flush()
                if self._finished():
                    break
        except h2.exceptions.ProtocolError as error:
            reason = f"this is not HTTP/2: {error}"
            with contextlib.suppress(StreamError):
                await self._flush()  # the GOAWAY that says why
        except StreamError as error:
            reason = str(error)
        finally:
            self.closed = True
            for channel in list(self._channels.values()):
                channel.fail(StreamError(reason))

    def _finished(self) -> bool:
        return self.closed and not self._channels

    async def _dispatch(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self._accept(event)
        elif isinstance(event, h2.events.ResponseReceived):
            channel = self._channels.get(event.stream_id)
            if channel is not None and not channel.head.done():
                channel.head.set_result(_bytes(event.headers))
        elif isinstance(event, h2.events.DataReceived):
            channel = self._channels.get(event.stream_id)
            if channel is None:
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            else:
                channel.chunks.append((event.data or b"", event.flow_controlled_length))
                channel.news.set()
        elif isinstance(event, h2.events.TrailersReceived):
            if (channel := self._channels.get(event.stream_id)) is not None:
                channel.trailers += [pair for pair in _bytes(event.headers) if not pair[0].startswith(b":")]
        elif isinstance(event, h2.events.StreamEnded):
            if (channel := self._channels.get(event.stream_id)) is not None:
                channel.ended = True
                channel.news.set()
        elif isinstance(event, h2.events.StreamReset):
            self._reset(event)
        elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            for channel in self._channels.values():
                channel.window.set()
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.closed = True
            for number, channel in list(self._channels.items()):
                if self._client and number > (event.last_stream_id or 0):
                    channel.fail(StreamError("the server ended the connection before it took the request"))

    def _accept(self, event: h2.events.RequestReceived) -> None:
        raise h2.exceptions.ProtocolError("a server sent a request")

    def _reset(self, event: h2.events.StreamReset) -> None:
        if (channel := self._channels.get(event.stream_id)) is not None:
            channel.fail(StreamError("the peer took the stream back"))

    async def _flush(self) -> None:
        async with self._writing:
            if data := self._h2.data_to_send():
                await self._stream.write(data)

    async def _incoming(self, number: int, channel: _Channel) -> AsyncIterator[bytes]:
        """A stream's body; what has been taken may come again."""
        while True:
            while channel.chunks:
                data, length = channel.chunks.popleft()
                if data:
                    yield data
                with contextlib.suppress(h2.exceptions.ProtocolError):
                    self._h2.acknowledge_received_data(length, number)
                await self._flush()
            if channel.error is not None:
                raise channel.error
            if channel.ended:
                return
            channel.news.clear()
            await channel.news.wait()

    async def _send_body(
        self, number: int, channel: _Channel, body: AsyncIterator[bytes], trailers: Headers
    ) -> None:
        """Send a body and its end as fast as the peer's windows allow."""
        async for chunk in body:
            view = memoryview(chunk)
            while view:
                channel.window.clear()
                size = min(self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size)
                if size <= 0:
                    await channel.window.wait()
                    if channel.error is not None:
                        raise channel.error
                    continue
                self._h2.send_data(number, bytes(view[:size]))
                view = view[size:]
                await self._flush()
        if trailers:
            self._h2.send_headers(number, trailers, end_stream=True)
        else:
            self._h2.end_stream(number)
        await self._flush()

    async def _abort(self, number: int, code: h2.errors.ErrorCodes) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError, StreamError):
            self._h2.reset_stream(number, code)
            await self._flush()

    def _forget(self, number: int) -> None:
        channel = self._channels.pop(number, None)
        if channel is not None:
            # Its bytes count against the connection's window for good if nobody gives them back.
            for _, length in channel.chunks:
                with contextlib.suppress(h2.exceptions.ProtocolError):
                    self._h2.acknowledge_received_data(length, number)
            channel.chunks.clear()


class Http2Server(_Session):
    """Answers the requests of a connection."""

    def __init__(self, stream: Stream, handler: Handler) -> None:
        super().__init__(stream, client=False)
        self._handler = handler
        self._resets = 0

    async def serve(self) -> None:
        """Serve the connection to its end, then close it."""
        try:
            with contextlib.suppress(StreamError):
                await self.open()
                await self.run()
        finally:
            tasks = [channel.task for channel in self._channels.values() if channel.task is not None]
            try:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                self._stream.close()

    def _accept(self, event: h2.events.RequestReceived) -> None:
        assert event.stream_id is not None
        channel = self._channels[event.stream_id] = _Channel()
        answer = self._answer(event.stream_id, channel, _bytes(event.headers), event.stream_ended is not None)
        channel.task = asyncio.create_task(answer)

    def _reset(self, event: h2.events.StreamReset) -> None:
        super()._reset(event)
        self._resets += 1
        if self._resets > MAX_RESETS:
            raise h2.exceptions.ProtocolError("too many streams were taken back")

    async def _answer(self, number: int, channel: _Channel, headers: Headers, ended: bool) -> None:
        response: Response | None = None
        try:
            try:
                response = await self._handler(self._request(number, channel, headers, ended))
            except HttpError as error:
                response = plain_response(error.status, f"voidbox: {error}\n")
            head = [(b":status", str(response.status).encode()), *end_to_end(response.headers)]
            self._h2.send_headers(number, head)
            await self._flush()
            await self._send_body(number, channel, response.body, response.trailers)
            if not channel.ended:
                await self._abort(number, h2.errors.ErrorCodes.NO_ERROR)
        except (StreamError, h2.exceptions.ProtocolError):
            await self._abort(number, h2.errors.ErrorCodes.INTERNAL_ERROR)
        except Exception:
            log.exception("a request was not answered")
            await self._abort(number, h2.errors.ErrorCodes.INTERNAL_ERROR)
        finally:
            if response is not None:
                await close_body(response.body)
            self._forget(number)

    def _request(self, number: int, channel: _Channel, headers: Headers, ended: bool) -> Request:
        pseudo = {name.decode(): value.decode("latin-1") for name, value in headers if name.startswith(b":")}
        fields = [pair for pair in headers if not pair[0].startswith(b":")]
        host = get(fields, b"host")
        authority = pseudo.get(":authority", "")
        if host is not None and authority and host.decode("latin-1").lower() != authority.lower():
            raise HttpError(421, "the request names another host than its Host header", reason="AUTHORITY")
        cookies = [value for name, value in fields if name == b"cookie"]
        fields = without(end_to_end(fields), b"host", b"expect", b"cookie")
        if cookies:  # RFC 9113 §8.2.3: crumbs are one header to anybody else
            fields.append((b"cookie", b"; ".join(cookies)))
        return Request(
            method=pseudo.get(":method", ""),
            scheme="https",
            authority=authority or (host or b"").decode("latin-1"),
            target=pseudo.get(":path", ""),
            headers=fields,
            body=self._incoming(number, channel),
            chunked=not ended and get(fields, b"content-length") is None,
            trailers=channel.trailers,
        )


class Http2Client(_Session):
    """One connection to a server, many exchanges at once. Owns the stream."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream, client=True)
        self._reading: asyncio.Task[None] | None = None
        self._room = asyncio.Event()

    async def start(self) -> None:
        """Say the preface and read from now on."""
        await self.open()
        self._reading = asyncio.create_task(self.run())

    def usable(self) -> bool:
        """Whether another request can be sent on it."""
        return not self.closed

    async def close(self) -> None:
        """End all exchanges and close the connection."""
        try:
            if self._reading is not None:
                self._reading.cancel()
                await asyncio.wait([self._reading])
        finally:
            self._stream.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._stream.close()

    async def send(self, request: Request) -> Response:
        """Send `request`; return once the head of the response is there.

        Raises:
            StreamError: the connection broke, or the server took the stream back.
        """
        while self._h2.open_outbound_streams >= self._h2.remote_settings.max_concurrent_streams:
            self._room.clear()
            await self._room.wait()
            if self.closed:
                raise StreamError("the server ended the connection")
        number = self._h2.get_next_available_stream_id()
        channel = self._channels[number] = _Channel()
        head = [
            (b":method", request.method.encode()),
            (b":scheme", request.scheme.encode()),
            (b":authority", request.authority.encode("latin-1")),
            (b":path", request.target.encode("latin-1")),
            *request.headers,
        ]
        try:
            self._h2.send_headers(number, head, end_stream=not request.has_body)
            await self._flush()
            if request.has_body:
                channel.task = asyncio.create_task(self._upload(number, channel, request))
            headers = await channel.head
        except h2.exceptions.ProtocolError as error:
            await self._drop(number, channel)
            raise StreamError(f"the request cannot be sent: {error}") from error
        except BaseException:
            await self._drop(number, channel)
            raise
        status = int(get(headers, b":status") or b"502")
        fields = [pair for pair in headers if not pair[0].startswith(b":")]
        body = Body(self._incoming(number, channel), lambda _: self._drop(number, channel))
        return Response(status=status, headers=fields, body=body, trailers=channel.trailers)

    async def _upload(self, number: int, channel: _Channel, request: Request) -> None:
        try:
            await self._send_body(number, channel, request.body, request.trailers)
        except (StreamError, h2.exceptions.ProtocolError) as error:
            if not channel.ended:
                channel.fail(StreamError(f"the request broke off: {error}"))
                await self._abort(number, h2.errors.ErrorCodes.CANCEL)

    async def _drop(self, number: int, channel: _Channel) -> None:
        task, channel.task = channel.task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if not channel.ended or (task is not None and task.cancelled()):
            await self._abort(number, h2.errors.ErrorCodes.CANCEL)
        self._forget(number)
        self._room.set()


def _bytes(headers: object) -> Headers:
    assert isinstance(headers, list)
    return [(_raw(name), _raw(value)) for name, value in headers]


def _raw(text: object) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else bytes(text)  # type: ignore[call-overload]
