"""QEMU's machine protocol: the protocol without I/O, and an asyncio client on top.

Format: one JSON object per line (docs/interop/qmp-spec.rst in QEMU's sources). The server
greets, the client answers with `qmp_capabilities`, then commands and events may alternate.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.common.errors import Internal, TimedOut, Unavailable

# QEMU's longest regular answer (query-qmp-schema) is about 200 KiB.
MAX_LINE_BYTES = 4 * 1024 * 1024
COMMAND_SECONDS = 30.0
_TRANSCRIPT_LINES = 200


class QmpBroke(Exception):
    """The peer sent what is not QMP; the connection cannot be used any more."""


class QmpError(Internal):
    """QEMU refused a command; `error_class` is QMP's own."""

    default_reason = "QMP_ERROR"

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}", command=command, error_class=error_class)
        self.error_class = error_class
        self.description = description


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """The server's first message."""

    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The result of command `id`."""

    id: int
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The refusal of command `id`; id -1 if QEMU could not even read the command."""

    id: int
    error_class: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened in the machine."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


Message = Greeting | Reply | Failure | Event


class QmpProtocol:
    """Bytes in, messages out; no I/O.

    After `QmpBroke` the object refuses further input.
    """

    def __init__(self, max_line: int = MAX_LINE_BYTES) -> None:
        self._buffer = bytearray()
        self._max_line = max_line
        self._next_id = 0
        self._broken = False

    def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """The id and the bytes of a new command."""
        number = self._next_id
        self._next_id += 1
        body: dict[str, Any] = {"execute": name, "id": number}
        if arguments:
            body["arguments"] = arguments
        return number, json.dumps(body, separators=(",", ":")).encode() + b"\n"

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes.

        Raises:
            QmpBroke: a line that is too long or is no QMP message.
        """
        if self._broken:
            raise QmpBroke("the connection already broke")
        try:
            return self._feed(data)
        except QmpBroke:
            self._broken = True
            raise

    def _feed(self, data: bytes) -> list[Message]:
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        if len(rest) > self._max_line or any(len(line) > self._max_line for line in lines):
            raise QmpBroke(f"a message is longer than {self._max_line} bytes")
        self._buffer = rest
        return [_parse(bytes(line)) for line in lines if line.strip()]


def _parse(line: bytes) -> Message:
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QmpBroke(f"not JSON: {line[:80]!r}") from error
    match body:
        case {"QMP": {"version": {"qemu": {"major": int(a), "minor": int(b), "micro": int(c)}}}}:
            return Greeting(version=f"{a}.{b}.{c}")
        case {"return": value, "id": int(number)}:
            return Reply(id=number, value=value)
        case {"error": {"class": str(kind), "desc": str(text)}}:
            number = body.get("id", -1)
            return Failure(id=number if isinstance(number, int) else -1, error_class=kind, description=text)
        case {"event": str(name)}:
            data = body.get("data", {})
            return Event(name=name, data=data if isinstance(data, dict) else {}, seconds=_time(body))
    raise QmpBroke(f"not a QMP message: {line[:80]!r}")


def _time(body: Mapping[str, Any]) -> float:
    match body.get("timestamp"):
        case {"seconds": int(seconds), "microseconds": int(micro)}:
            return seconds + micro / 1e6
    return 0.0


class QmpClient:
    """A QMP session. Made by `connect`; after its end every command fails with `Unavailable`.

    Attributes:
        version: QEMU's version.
        closed: Set when the session has ended.
        transcript: The last lines that crossed it, for failure reports.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_event: Callable[[Event], None] | None = None,
        connection: socket.socket | None = None,
    ) -> None:
        self._connection = connection
        self._sending = asyncio.Lock()
        self._reader = reader
        self._writer = writer
        self._on_event = on_event
        self._protocol = QmpProtocol()
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._greeted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._pump_task: asyncio.Task[None] | None = None
        self.version = ""
        self.closed = asyncio.Event()
        self.transcript: collections.deque[str] = collections.deque(maxlen=_TRANSCRIPT_LINES)

    async def _open(self, seconds: float) -> None:
        self._pump_task = asyncio.create_task(self._pump(), name="qmp")
        try:
            async with asyncio.timeout(seconds):
                self.version = await self._greeted
        except TimeoutError as error:
            raise TimedOut(f"QEMU did not greet within {seconds:g} s", reason="QMP_TIMEOUT") from error
        await self.execute("qmp_capabilities", seconds=seconds)

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        seconds: float = COMMAND_SECONDS,
        fd: int | None = None,
    ) -> Any:
        """Run a command and return its result.

        Args:
            name: The command.
            arguments: Its arguments.
            seconds: How long the answer may take.
            fd: A descriptor that goes with it; QEMU gets a copy.

        Raises:
            QmpError: QEMU refused it.
            TimedOut: no answer within `seconds`; the session stays usable.
            Unavailable: the session has ended.
        """
        if self.closed.is_set():
            raise Unavailable(f"QEMU's monitor is closed; cannot {name}", reason="QMP_CLOSED")
        number, line = self._protocol.command(name, arguments)
        answer = self._pending[number] = asyncio.get_running_loop().create_future()
        self.transcript.append(f"> {line.decode().strip()}")
        try:
            async with asyncio.timeout(seconds):
                await self._send(line, fd)
                result = await answer
        except TimeoutError as error:
            raise TimedOut(
                f"QEMU did not answer {name} within {seconds:g} s", reason="QMP_TIMEOUT"
            ) from error
        finally:
            self._pending.pop(number, None)
        if isinstance(result, Failure):
            raise QmpError(name, result.error_class, result.description)
        return result.value

    async def _send(self, line: bytes, fd: int | None) -> None:
        async with self._sending:
            with contextlib.suppress(OSError):  # the reader notices the end and fails the future
                if fd is not None:
                    if self._connection is None:
                        raise Internal("this monitor takes no descriptors")
                    # With the first byte; the stream's own buffer is empty, since each sender drains it.
                    socket.send_fds(self._connection, [line[:1]], [fd])
                    line = line[1:]
                self._writer.write(line)
                await self._writer.drain()

    async def _pump(self) -> None:
        why = "QEMU closed its monitor"
        try:
            while data := await self._reader.read(65536):
                for message in self._protocol.feed(data):
                    self._dispatch(message)
        except (OSError, QmpBroke) as error:
            why = f"QEMU's monitor failed: {error}"
        finally:
            self.closed.set()
            for future in (self._greeted, *self._pending.values()):
                if not future.done():
                    future.set_exception(Unavailable(why, reason="QMP_CLOSED"))
                    future.exception()  # whoever waits sees it; nobody may wait
            self._writer.close()

    def _dispatch(self, message: Message) -> None:
        self.transcript.append(f"< {message}"[:2000])
        match message:
            case Greeting(version=version):
                if not self._greeted.done():
                    self._greeted.set_result(version)
            case Reply(id=number) | Failure(id=number):
                future = self._pending.get(number)
                if future is not None and not future.done():
                    future.set_result(message)
            case Event() if self._on_event is not None:
                self._on_event(message)

    async def close(self) -> None:
        """End the session; QEMU goes on. Idempotent."""
        if self._pump_task is not None:
            self._pump_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump_task
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


@contextlib.asynccontextmanager
async def connect(
    connection: socket.socket,
    *,
    on_event: Callable[[Event], None] | None = None,
    seconds: float = COMMAND_SECONDS,
) -> AsyncIterator[QmpClient]:
    """A session over `connection`, which it owns from now on.

    Raises:
        TimedOut: QEMU does not greet in time.
        Unavailable: QEMU ends before it greets.
    """
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    # Whatever is written is gone once `drain` returns.
    writer.transport.set_write_buffer_limits(0)
    client = QmpClient(reader, writer, on_event, connection)
    try:
        await client._open(seconds)
        yield client
    finally:
        await client.close()
