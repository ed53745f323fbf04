"""WebSockets between a box and a server: messages are taken apart and framed anew (RFC 6455), by wsproto.

Extensions are not negotiated, so that no message is compressed past the eyes of whoever masks it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Message, Ping, Pong, TextMessage
from wsproto.utilities import ProtocolError

from services.hypervisor.egress.stream import Stream, StreamError

# One message. A secret that is split over frames is found only in the whole.
MAX_MESSAGE_BYTES: Final = 16 << 20
_TOO_BIG: Final = 1009
_BROKEN: Final = 1002


async def relay(
    client: Stream,
    client_rest: bytes,
    server: Stream,
    server_rest: bytes,
    change: Callable[[bytes], bytes] | None,
) -> None:
    """Pass messages on in both directions until one side ends. Closes neither.

    Args:
        change: Applied to each message of the server; keeps its length and that it is text.
    """
    inner, outer = Connection(ConnectionType.SERVER), Connection(ConnectionType.CLIENT)
    up = asyncio.create_task(_pass(client, client_rest, inner, server, outer, None))
    down = asyncio.create_task(_pass(server, server_rest, outer, client, inner, change))
    try:
        await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (up, down):
            task.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _pass(
    source: Stream,
    rest: bytes,
    reading: Connection,
    target: Stream,
    writing: Connection,
    change: Callable[[bytes], bytes] | None,
) -> None:
    whole: list[bytes] = []
    size = 0
    with contextlib.suppress(StreamError):
        data: bytes | None = rest or await source.read()
        while data:
            try:
                reading.receive_data(data)
                events = list(reading.events())
            except ProtocolError as error:
                await _end(source, reading, _BROKEN, str(error))
                return
            for event in events:
                if isinstance(event, Message):
                    part = event.data.encode() if isinstance(event.data, str) else bytes(event.data)
                    whole.append(part)
                    size += len(part)
                    if size > MAX_MESSAGE_BYTES:
                        await _end(source, reading, _TOO_BIG, "a message is limited to 16 MiB")
                        return
                    if event.message_finished:
                        message = b"".join(whole)
                        whole, size = [], 0
                        if change is not None:
                            message = change(message)
                        await target.write(writing.send(_message(event, message)))
                elif isinstance(event, Ping | Pong):
                    await target.write(writing.send(event))
                elif isinstance(event, CloseConnection):
                    with contextlib.suppress(ProtocolError):  # both closed at once
                        await target.write(writing.send(event))
                        await source.write(reading.send(event.response()))
                    return
            data = await source.read()


def _message(event: Message, data: bytes) -> Event:  # type: ignore[type-arg]
    if isinstance(event, TextMessage):
        return TextMessage(data=data.decode())
    return BytesMessage(data=data)


async def _end(stream: Stream, connection: Connection, code: int, reason: str) -> None:
    with contextlib.suppress(ProtocolError):
        await stream.write(connection.send(CloseConnection(code=code, reason=reason[:100])))
