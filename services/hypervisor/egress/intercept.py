"""Takes over a box's connections to hosts with a rule: credentials go in, and never come back out."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

from services.common.errors import VoidboxError
from services.hypervisor.egress import rules as r
from services.hypervisor.egress.audit import AuditLog, Event
from services.hypervisor.egress.ca import BoxAuthority
from services.hypervisor.egress.coding import decoded
from services.hypervisor.egress.flow import Dial, Flow
from services.hypervisor.egress.http1 import serve_http1
from services.hypervisor.egress.http2 import Http2Server
from services.hypervisor.egress.mask import Mask
from services.hypervisor.egress.message import (
    Body,
    Headers,
    HttpError,
    Request,
    Response,
    close_body,
    get,
    without,
)
from services.hypervisor.egress.secret import CredentialSource, Secret
from services.hypervisor.egress.serverside import Upstream
from services.hypervisor.egress.stream import PlainStream, StreamError, serve_tls

# What is kept of a request's body so that it can be sent again with a renewed token, or read for
# its limits. The largest request that Anthropic takes has 32 MB, OpenAI's 50 MB; such are rare.
KEPT_BODY: Final = 8 << 20

_AUTHORITY: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:/@?#\\\s]+)(?::([0-9]{1,5}))?")


class Watcher(Protocol):
    """Follows one exchange; what it is given is what the box sees."""

    def response(self, status: int, headers: Headers) -> None:
        """The response's head."""

    def data(self, chunk: bytes) -> None:
        """Some of its body."""

    def end(self, complete: bool) -> None:
        """It is over; called once."""


class Watching(Protocol):
    """Meters, and recorders."""

    def wants(self, host: str) -> bool:
        """Whether connections to `host` are its business."""

    async def begin(self, request: Request, host: str, port: int) -> Watcher | None:
        """Follow an exchange; the request's body may be wrapped.

        Raises:
            HttpError: it must not happen.
        """


class Answering(Protocol):
    """Answers some requests in the server's stead."""

    def wants(self, host: str) -> bool:
        """Whether connections to `host` are its business."""

    async def answer(self, request: Request, host: str, port: int) -> Response | None:
        """The answer, or None to ask the server.

        Raises:
            HttpError: it must not be asked.
        """


class EgressInterceptor:
    """Serves the intercepted connections of one box.

    Args:
        rules: The box's credentials.
        authority: Makes the certificates that the box trusts.
        source: Gives the credentials' values.
        audit: Told of every exchange.
        trust: What servers are checked against.
        answering: Asked in this order before a server is.
        watching: Follow every exchange.
        trace: Id of the trace that the box belongs to, for the audit.
    """

    def __init__(
        self,
        *,
        rules: Sequence[r.Rule],
        authority: BoxAuthority,
        source: CredentialSource,
        audit: AuditLog,
        trust: ssl.SSLContext,
        trust_http1: ssl.SSLContext,
        answering: Sequence[Answering] = (),
        watching: Sequence[Watching] = (),
        trace: str = "",
    ) -> None:
        self._rules = tuple(rules)
        self._authority = authority
        self._source = source
        self._audit = audit
        self._trust = (trust, trust_http1)
        self._answering = tuple(answering)
        self._watching = tuple(watching)
        self._trace = trace
        self.mask = Mask()

    def wants(self, flow: Flow) -> bool:
        """Whether a connection is terminated here; asked after the policy has allowed it."""
        if flow.kind not in ("tls", "http"):
            return False
        name, port, secure = server_name(flow), flow.destination[1], flow.kind == "tls"
        if any(rule.covers(name, port, secure) for rule in self._rules):
            return True
        interested = [*(one.wants for one in self._answering), *(one.wants for one in self._watching)]
        return any(wants(name) for wants in interested)

    async def intercept(self, client: socket.socket, first: bytes, flow: Flow, dial: Dial) -> None:
        """Serve one connection to its end; the client's socket is closed then."""
        name = server_name(flow)

        def count(sent: int, received: int) -> None:
            flow.sent += sent
            flow.received += received

        secure = flow.kind == "tls"
        upstream = Upstream(flow, name, dial, self._trust if secure else None)
        connection = _Connection(self, flow, name, upstream)
        flow.sent += len(first)
        try:
            if not secure:
                await serve_http1(PlainStream(client, first, count), connection.handle)
                return
            try:
                stream = await serve_tls(client, self._authority.context(name), first, count)
            except StreamError as error:
                self.event(flow, Event(kind="http", allowed=False, name=name, reason=f"the box: {error}"))
                return
            if stream.alpn == "h2":
                await Http2Server(stream, connection.handle).serve()
            else:
                await serve_http1(stream, connection.handle)
        finally:
            await upstream.close()

    def event(self, flow: Flow, event: Event) -> None:
        """Write an event of `flow`."""
        self._audit.record(event)

    async def exchange(self, connection: _Connection, request: Request) -> Response:
        """Do one exchange.

        Raises:
            HttpError: it is refused, or the server cannot be had.
        """
        name, port = connection.name, connection.port
        audit = _Audited(self, connection, request, self._trace)
        try:
            check_authority(request, name, port)
            r.check_target(request.target)
            if request.method in ("TRACE", "TRACK", "CONNECT"):
                raise HttpError(405, f"{request.method} is not for hosts with a rule", reason="METHOD")
            self._refuse_known(request)
            for answering in self._answering:
                response = await answering.answer(request, name, port)
                if response is not None:
                    audit.detail["answered"] = "voidbox"
                    return self._out(response, [audit])
            watchers: list[Watcher] = [audit]
            try:
                for watching in self._watching:
                    watcher = await watching.begin(request, name, port)
                    if watcher is not None:
                        watchers.insert(0, watcher)
                response = await self._ask(connection, request, audit)
                return self._out(decoded(response), watchers)
            except BaseException:
                for watcher in watchers[:-1]:
                    watcher.end(False)
                raise
        except HttpError as error:
            audit.refused(error)
            raise
        except BaseException:
            audit.end(False)
            raise

    async def _ask(self, connection: _Connection, request: Request, audit: _Audited) -> Response:
        """Send the request with its credential; once more if a token was refused and can be renewed."""
        rule = r.find(self._rules, request, connection.name, connection.port)
        strip = [b"accept-encoding", b"sec-websocket-extensions"]
        if rule is not None:
            # Pieces of a secret, each too short to be known, must not be had one by one.
            strip += [b"range", b"if-range", *r.CREDENTIAL_HEADERS]
        request.headers = [*without(request.headers, *strip), (b"accept-encoding", b"identity")]
        if rule is None:
            return await connection.upstream.send(request)
        audit.rule = rule.id
        secret = await self._secret(rule, connection.name, "")
        body, rest = b"", None
        if secret.renewable and request.has_body:
            body, rest = await collect(request.body, KEPT_BODY)
            request.body = joined(body, rest)
        target = request.target
        self._apply(rule, request, secret)
        response = await connection.upstream.send(request)
        if response.status != 401 or not secret.renewable or rest is not None:
            return response
        renewed = await self._secret(rule, connection.name, secret.value)
        if renewed.value == secret.value:
            return response
        await abandon(response)
        audit.detail["renewed"] = True
        request.target, request.body = target, joined(body, None)
        self._apply(rule, request, renewed)
        return await connection.upstream.send(request)

    async def _secret(self, rule: r.Rule, host: str, rejected: str) -> Secret:
        try:
            secret = await self._source.get(rule.id, host, rejected)
            hidden = {secret.value}
            if rule.placement is r.Placement.BASIC:
                hidden.add(f"{rule.name}:{secret.value}")
            self.mask.learn(hidden)
        except VoidboxError as error:
            raise HttpError(502, f"credential {rule.id!r}: {error.message}", reason="CREDENTIAL") from error
        except ValueError as error:
            raise HttpError(502, str(error), reason="CREDENTIAL") from error
        return secret

    @staticmethod
    def _apply(rule: r.Rule, request: Request, secret: Secret) -> None:
        try:
            rule.apply(request, secret.value)
        except ValueError as error:
            raise HttpError(502, str(error), reason="CREDENTIAL") from error
        extra = [(name.lower().encode(), value.encode()) for name, value in secret.headers.items()]
        request.headers = [*without(request.headers, *(name for name, _ in extra)), *extra]

    def _refuse_known(self, request: Request) -> None:
        head = b"\n".join([request.target.encode("latin-1"), *(value for _, value in request.headers)])
        if self.mask.seen(head):
            raise HttpError(403, "the request has a credential of the host in it", reason="LEAK")

    def _out(self, response: Response, watchers: Sequence[Watcher]) -> Response:
        """`response` as the box may see it, followed by `watchers`."""
        mask = self.mask
        headers = [(name, mask.cover(value)) for name, value in response.headers]
        trailers: Headers = []
        for watcher in watchers:
            watcher.response(response.status, headers)

        def message(data: bytes) -> bytes:
            data = mask.cover(data)
            for watcher in watchers:
                watcher.data(data)
            return data

        length, received = get(headers, b"content-length"), 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal received
            async for chunk in mask.stream(response.body):
                received += len(chunk)
                for watcher in watchers:
                    watcher.data(chunk)
                yield chunk
            trailers.extend((name, mask.cover(value)) for name, value in response.trailers)

        async def closing(complete: bool) -> None:
            # A client that has all it was promised may hang up before our side has looked for more.
            complete = complete or (length is not None and length == str(received).encode())
            for watcher in watchers:
                watcher.end(complete)
            await close_body(response.body)

        return Response(
            status=response.status,
            headers=headers,
            body=Body(body(), closing),
            trailers=trailers,
            tunnel=response.tunnel,
            messages=message,
        )


class _Connection:
    """One connection of a box."""

    def __init__(self, owner: EgressInterceptor, flow: Flow, name: str, upstream: Upstream) -> None:
        self._owner = owner
        self.flow = flow
        self.name = name
        self.port = flow.destination[1]
        self.upstream = upstream

    async def handle(self, request: Request) -> Response:
        """Do one exchange."""
        return await self._owner.exchange(self, request)


class _Audited:
    """Writes one event when an exchange is over."""

    def __init__(
        self, owner: EgressInterceptor, connection: _Connection, request: Request, trace: str
    ) -> None:
        self._owner = owner
        self._connection = connection
        self._begin = time.monotonic()
        self._sent = 0
        self._received = 0
        self._over = False
        self.rule = ""
        self.detail: dict[str, str | int | float | bool] = {
            "method": request.method[:32],
            "path": self._masked(request.target.partition("?")[0]),
        }
        if trace:
            self.detail["trace"] = trace
        if request.has_body:
            request.body = self._counted(request.body)

    def _masked(self, text: str) -> str:
        return self._owner.mask.cover(text.encode("latin-1")).decode("latin-1")[:256]

    async def _counted(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in body:
            self._sent += len(chunk)
            yield chunk

    def response(self, status: int, _: Headers) -> None:
        self.detail["status"] = status

    def data(self, chunk: bytes) -> None:
        self._received += len(chunk)

    def end(self, complete: bool) -> None:
        if not complete:
            self.detail["complete"] = False
        self._write(True, "")

    def refused(self, error: HttpError) -> None:
        self.detail["status"] = error.status
        self.detail["error"] = error.reason
        self._write(False, self._masked(str(error)))

    def _write(self, allowed: bool, reason: str) -> None:
        if self._over:
            return
        self._over = True
        flow = self._connection.flow
        event = Event(
            kind="http",
            allowed=allowed,
            name=self._connection.name,
            address=flow.destination[0],
            port=flow.destination[1],
            rule=self.rule,
            reason=reason,
            sent=self._sent,
            received=self._received,
            duration=round(time.monotonic() - self._begin, 6),
            detail=self.detail,
        )
        self._owner.event(flow, event)


def server_name(flow: Flow) -> str:
    """The server that a connection is for, in one spelling."""
    return (flow.sni or flow.name or flow.host or flow.destination[0]).lower().rstrip(".")


def check_authority(request: Request, name: str, port: int) -> None:
    """Refuse a request for another server than the connection's.

    Raises:
        HttpError: it is one. 421 makes a browser or HTTP/2 client open another connection.
    """
    match = _AUTHORITY.fullmatch(request.authority)
    if match is None:
        raise HttpError(400, "the request does not say which host it is for", reason="AUTHORITY")
    host = match[1].strip("[]").lower().rstrip(".")
    default = 443 if request.scheme == "https" else 80
    if host != name or int(match[2] or default) != port:
        raise HttpError(
            421, f"this connection is for {name}:{port}, not for {request.authority}", reason="AUTHORITY"
        )


async def collect(body: AsyncIterator[bytes], limit: int) -> tuple[bytes, AsyncIterator[bytes] | None]:
    """The whole body and None, or more than `limit` bytes of it and the rest."""
    chunks, size = [], 0
    async for chunk in body:
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            return b"".join(chunks), body
    return b"".join(chunks), None


async def joined(first: bytes, rest: AsyncIterator[bytes] | None) -> AsyncIterator[bytes]:
    """`first`, then `rest`."""
    if first:
        yield first
    if rest is not None:
        async for chunk in rest:
            yield chunk


async def abandon(response: Response) -> None:
    """Give up a response that is not passed on; a short one is read so that its connection can be kept."""
    left = 64 << 10
    try:
        async with asyncio.timeout(5):  # a server that dawdles with its error gets a new connection
            async for chunk in response.body:
                left -= len(chunk)
                if left < 0:
                    break
    except (StreamError, TimeoutError):
        pass
    await close_body(response.body)
