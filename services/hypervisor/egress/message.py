"""HTTP requests and responses, whatever version carries them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from services.hypervisor.egress.stream import Stream

Headers = list[tuple[bytes, bytes]]
"""Names in lower case."""

# RFC 9110 §7.6.1: they belong to one connection, and what `connection` names as well.
HOP_BY_HOP: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade", b"trailer")
)
# All heads of one message together. nginx takes 32 KiB, Node 16 KiB.
MAX_HEAD_BYTES: Final = 64 << 10


class HttpError(Exception):
    """A peer broke HTTP, or asks for what is refused.

    Args:
        status: What the client is told; 400 to 599.
        message: Why, and what to do about it.
        reason: Stable, for programs and the audit.
    """

    def __init__(self, status: int, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


@dataclass(slots=True, kw_only=True)
class Request:
    """A request, its body still to come.

    Attributes:
        authority: Host and port as the client gave them.
        target: Path and query.
        body: Ends with the request's body; reading it is what lets more of it come.
        chunked: Whether there is a body whose length is not told in advance.
        trailers: Complete once `body` has ended.
        websocket: Whether it asks to become a WebSocket.
    """

    method: str
    scheme: str
    authority: str
    target: str
    headers: Headers
    body: AsyncIterator[bytes]
    chunked: bool = False
    trailers: Headers = field(default_factory=list)
    websocket: bool = False

    @property
    def has_body(self) -> bool:
        """Whether anything may come in `body`."""
        return self.chunked or get(self.headers, b"content-length") not in (None, b"0")


@dataclass(slots=True, kw_only=True)
class Response:
    """A response, its body still to come.

    Attributes:
        body: Ends with the response's body. Closing it early abandons the exchange.
        trailers: Complete once `body` has ended.
        tunnel: For a WebSocket that was accepted: the connection behind, and what was read of it.
        messages: Changes the server's messages on a WebSocket.
    """

    status: int
    headers: Headers
    body: AsyncIterator[bytes]
    trailers: Headers = field(default_factory=list)
    tunnel: tuple[Stream, bytes] | None = None
    messages: Callable[[bytes], bytes] | None = None


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Body:
    """A body with an end that is noticed, whether it was read to it, broke off or was never begun.

    Args:
        chunks: The body.
        closing: Told once whether it came to its end.
    """

    def __init__(self, chunks: AsyncIterator[bytes], closing: Callable[[bool], Awaitable[None]]) -> None:
        self._chunks = chunks
        self._closing: Callable[[bool], Awaitable[None]] | None = closing

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._chunks)
        except StopAsyncIteration:
            await self._finish(True)
            raise
        except BaseException:
            await self._finish(False)
            raise

    async def _finish(self, complete: bool) -> None:
        closing, self._closing = self._closing, None
        if closing is not None:
            await closing(complete)

    async def aclose(self) -> None:
        """Abandon what is left of it. Idempotent."""
        await close_body(self._chunks)
        await self._finish(False)


async def close_body(body: AsyncIterator[bytes]) -> None:
    """Abandon what is left of a body."""
    if isinstance(body, Body | AsyncGenerator):
        await body.aclose()


def get(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header."""
    return next((value for key, value in headers if key == name), None)


def without(headers: Iterable[tuple[bytes, bytes]], *names: bytes) -> Headers:
    """All headers but these."""
    return [(key, value) for key, value in headers if key not in names]


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers that go on to the next hop."""
    all_ = list(headers)
    named = {
        part.strip().lower() for key, value in all_ if key == b"connection" for part in value.split(b",")
    }
    # A client that lists `authorization` here would have it removed behind our back elsewhere.
    return [(key, value) for key, value in all_ if key not in HOP_BY_HOP and key not in named]


async def nothing() -> AsyncIterator[bytes]:
    """An empty body."""
    return
    yield b""


async def one(data: bytes) -> AsyncIterator[bytes]:
    """A body of one piece."""
    yield data


def plain_response(status: int, text: str, *, kind: bytes = b"text/plain; charset=utf-8") -> Response:
    """A whole response of ours."""
    data = text.encode()
    headers = [(b"content-type", kind), (b"content-length", str(len(data)).encode())]
    return Response(status=status, headers=headers, body=one(data))
