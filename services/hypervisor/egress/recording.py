"""Every exchange of a box, kept as it passed, and a box served from that without a network.

A recording is JSON lines that are only appended, each about one exchange: `request`, `sent` and
`received` (base64), `response`, `end`. What a box sees is recorded, so there is no credential of the
host in it; a box's own are left out. One that was cut off is good up to there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

from services.common.errors import Corrupt
from services.hypervisor.egress.intercept import KEPT_BODY, collect
from services.hypervisor.egress.message import Body, Headers, HttpError, Request, Response, end_to_end
from services.hypervisor.egress.rules import CREDENTIAL_HEADERS
from services.hypervisor.egress.stream import StreamError

VERSION: Final = 1
# One line of a recording; bodies are written in the pieces that they came in, of 64 KiB at most.
_MAX_LINE: Final = 1 << 20
_HIDDEN: Final = (*CREDENTIAL_HEADERS, b"cookie", b"set-cookie")
# What programs choose anew each time they run, so that requests of two runs differ by it alone.
_VOLATILE_KEYS: Final = frozenset(
    {"metadata", "client_metadata", "prompt_cache_key", "user", "safety_identifier"}
)
_VOLATILE: Final = re.compile(
    r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"  # UUIDs
    r"|[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[T ][0-9:.]+(?:Z|[+-][0-9:]+)?)?"  # times
    r"|[0-9a-fA-F]{32,}"  # digests and ids
)


class Recorder:
    """Appends exchanges to a file.

    Args:
        fd: Opened to append; not owned.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._next = 0
        self._write({"voidbox_recording": VERSION})

    def wants(self, host: str) -> bool:
        """Everything is recorded."""
        return True

    async def begin(self, request: Request, host: str, port: int) -> _Recorded:
        """Record an exchange.

        Raises:
            HttpError: it cannot be kept.
        """
        number, self._next = self._next, self._next + 1
        head = {
            "method": request.method,
            "scheme": request.scheme,
            "host": host,
            "port": port,
            "target": request.target,
            "headers": _plain(request.headers),
            "websocket": request.websocket,
        }
        self._write({"exchange": number, "request": head})
        if request.has_body:
            request.body = self._sent(number, request.body)
        return _Recorded(self, number)

    async def _sent(self, number: int, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in body:
            self.piece(number, "sent", chunk)
            yield chunk

    def piece(self, number: int, side: str, chunk: bytes) -> None:
        """Record a piece of a body."""
        for at in range(0, len(chunk), 64 << 10):
            data = base64.b64encode(chunk[at : at + (64 << 10)]).decode()
            self._write({"exchange": number, side: data})

    def note(self, number: int, key: str, value: object) -> None:
        """Record something else of an exchange."""
        self._write({"exchange": number, key: value})

    def _write(self, line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            # A recording with holes would be worse than none.
            raise HttpError(
                507, f"the recording cannot be written: {error.strerror}", reason="RECORD"
            ) from error
        if written != len(data):
            raise HttpError(507, "the recording cannot be written: the disk is full", reason="RECORD")


class _Recorded:
    """One exchange."""

    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder = recorder
        self._number = number

    def response(self, status: int, headers: Headers) -> None:
        """The response's head."""
        head = {"status": status, "headers": _plain(end_to_end(headers))}
        self._recorder.note(self._number, "response", head)

    def data(self, chunk: bytes) -> None:
        """Some of its body."""
        self._recorder.piece(self._number, "received", chunk)

    def end(self, complete: bool) -> None:
        """It is over."""
        self._recorder.note(self._number, "end", complete)


@dataclass(slots=True)
class _Exchange:
    request: dict[str, Any]
    sent: list[tuple[int, int]] = field(default_factory=list)
    response: dict[str, Any] | None = None
    received: list[tuple[int, int]] = field(default_factory=list)
    complete: bool = False
    used: bool = False


class Replayer:
    """Answers from a recording, each recorded exchange once; what was not recorded is refused.

    Args:
        fd: The recording, readable at any offset; not owned.

    Raises:
        Corrupt: it is none.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._exchanges: dict[int, _Exchange] = {}
        self._by_key: dict[bytes, list[_Exchange]] = {}
        self._load()

    def wants(self, host: str) -> bool:
        """Nothing reaches the network."""
        return True

    async def answer(self, request: Request, host: str, port: int) -> Response:
        """The recorded answer.

        Raises:
            HttpError: this request was not recorded, or not so often.
        """
        body, rest = await collect(request.body, KEPT_BODY) if request.has_body else (b"", None)
        head = {
            "method": request.method,
            "scheme": request.scheme,
            "host": host,
            "target": request.target,
            "websocket": request.websocket,
        }
        found = [] if rest is not None else self._by_key.get(_key(head, body), [])
        exchange = next((one for one in found if not one.used), None)
        if exchange is None or exchange.response is None or request.websocket:
            raise HttpError(403, self._difference(head, body, bool(found)), reason="REPLAY_DIVERGED")
        exchange.used = True
        answer = exchange.response
        headers = [
            (str(name).encode("latin-1"), str(value).encode("latin-1")) for name, value in answer["headers"]
        ]

        async def closing(_: bool) -> None:
            pass

        return Response(status=answer["status"], headers=headers, body=Body(self._body(exchange), closing))

    @property
    def left(self) -> int:
        """Recorded exchanges that were not asked for."""
        return sum(not exchange.used for exchange in self._exchanges.values())

    async def _body(self, exchange: _Exchange) -> AsyncIterator[bytes]:
        for piece in exchange.received:
            yield self._piece(piece, "received")
        if not exchange.complete:
            raise StreamError("the recorded answer broke off here")

    def _piece(self, place: tuple[int, int], side: str) -> bytes:
        line = json.loads(os.pread(self._fd, place[1], place[0]))
        return base64.b64decode(line[side])

    def _load(self) -> None:
        offset = 0
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            for line in iter(lambda: file.readline(_MAX_LINE), b""):
                if not line.endswith(b"\n"):
                    break  # cut off while it was written
                try:
                    self._line(json.loads(line), (offset, len(line)))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise Corrupt(f"the recording is damaged at byte {offset}: {error}") from error
                offset += len(line)
        if not offset:
            raise Corrupt("the recording is empty")
        for exchange in self._exchanges.values():
            body = b"".join(self._piece(piece, "sent") for piece in exchange.sent)
            self._by_key.setdefault(_key(exchange.request, body), []).append(exchange)

    def _line(self, line: dict[str, Any], place: tuple[int, int]) -> None:
        if place[0] == 0:
            if line["voidbox_recording"] != VERSION:
                raise ValueError(f"version {line['voidbox_recording']} is not {VERSION}")
            return
        if "request" in line:
            self._exchanges[line["exchange"]] = _Exchange(line["request"])
            return
        if "voidbox_recording" in line:
            return  # the recording was gone on with
        exchange = self._exchanges[line["exchange"]]
        if "sent" in line:
            exchange.sent.append(place)
        elif "received" in line:
            exchange.received.append(place)
        elif "response" in line:
            exchange.response = line["response"]
        elif "end" in line:
            exchange.complete = bool(line["end"])

    def _difference(self, head: dict[str, Any], body: bytes, too_often: bool) -> str:
        what = f"{head['method']} {head['scheme']}://{head['host']}{head['target'].partition('?')[0]}"
        if too_often:
            return f"the replay has no more answers to {what}: it was recorded less often"
        path = head["target"].partition("?")[0]
        for exchange in self._exchanges.values():
            other = exchange.request
            same = (other["method"], other["host"], other["target"].partition("?")[0])
            if not exchange.used and same == (head["method"], head["host"], path):
                if other["target"] != head["target"]:
                    return f"the replay diverges: {what} was recorded with another query"
                sent = b"".join(self._piece(piece, "sent") for piece in exchange.sent)
                place = _first_difference(_canonical(sent), _canonical(body))
                return (
                    f"the replay diverges: {what} was recorded with another body; first difference: {place}"
                )
        return f"the replay diverges: {what} was not recorded"


def _plain(headers: Headers) -> list[list[str]]:
    return [
        [name.decode("latin-1"), "(hidden)" if name in _HIDDEN else value.decode("latin-1")]
        for name, value in headers
    ]


def _key(head: dict[str, Any], body: bytes) -> bytes:
    target = _VOLATILE.sub("*", head["target"])
    parts = [head["method"], head["scheme"], head["host"], target, _canonical(body)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def _canonical(body: bytes) -> Any:
    """A body without what differs between two runs that do the same."""
    try:
        return _stable(json.loads(body))
    except (ValueError, RecursionError):
        return _VOLATILE.sub("*", body.decode("latin-1"))


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(part) for key, part in value.items() if key not in _VOLATILE_KEYS}
    if isinstance(value, list):
        return [_stable(part) for part in value]
    return _VOLATILE.sub("*", value) if isinstance(value, str) else value


def _first_difference(one: Any, other: Any, at: str = "") -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                return _first_difference(one.get(key), other.get(key), f"{at}/{key}")
    if isinstance(one, list) and isinstance(other, list):
        for number, (left, right) in enumerate(zip(one, other, strict=False)):
            if left != right:
                return _first_difference(left, right, f"{at}/{number}")
        return f"{at or '/'} has {len(other)} items instead of {len(one)}"
    return at or "/"
