"""QMP as bytes, split everywhere, and the client against a scripted peer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import TimedOut, Unavailable
from services.hypervisor import qmp
from services.hypervisor.qmp import Event, Failure, Greeting, QmpBroke, QmpProtocol, Reply

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}\r\n'
TRAFFIC = (
    GREETING
    + b'{"return": {}, "id": 0}\r\n'
    + b'{"timestamp": {"seconds": 5, "microseconds": 250000}, '
    + b'"event": "SHUTDOWN", "data": {"reason": "x"}}\r\n'
    + b'{"id": 1, "error": {"class": "GenericError", "desc": "no"}}\r\n'
    + b'{"return": [1, "\xc3\xa9"], "id": 2}\n'
)
MESSAGES = [
    Greeting(version="7.2.22"),
    Reply(id=0, value={}),
    Event(name="SHUTDOWN", data={"reason": "x"}, seconds=5.25),
    Failure(id=1, error_class="GenericError", description="no"),
    Reply(id=2, value=[1, "é"]),
]


@pytest.mark.parametrize("at", range(len(TRAFFIC) + 1))
def test_traffic_split_at_every_byte_gives_the_same_messages(at: int) -> None:
    protocol = QmpProtocol()
    assert protocol.feed(TRAFFIC[:at]) + protocol.feed(TRAFFIC[at:]) == MESSAGES


@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_an_error_of_the_protocol(data: bytes) -> None:
    protocol = QmpProtocol()
    try:
        protocol.feed(data)
    except QmpBroke:
        with pytest.raises(QmpBroke):
            protocol.feed(b"")


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n", b"[]\n", b"{}\n", b'{"return": 1}\n', b'{"QMP": {}}\n', b'{"event": 3}\n',
        b'{"error": "x"}\n', b"[" * 100_000 + b"\n", b"\xff\xfe\n",
    ],
)  # fmt: skip
def test_what_is_no_message_breaks_the_session(line: bytes) -> None:
    with pytest.raises(QmpBroke):
        QmpProtocol().feed(line)


def test_a_line_that_is_too_long_is_refused_before_its_end() -> None:
    protocol = QmpProtocol(max_line=100)
    assert protocol.feed(b" " * 60) == []
    with pytest.raises(QmpBroke, match="longer than 100"):
        protocol.feed(b" " * 60)


def test_commands_are_numbered_and_one_line_each() -> None:
    protocol = QmpProtocol()
    number, line = protocol.command("stop")
    other, second = protocol.command("x", {"a": "line\nbreak"})
    assert (number, other) == (0, 1)
    assert json.loads(line) == {"execute": "stop", "id": 0}
    assert second.count(b"\n") == 1
    assert json.loads(second)["arguments"] == {"a": "line\nbreak"}


class Peer:
    """The server's end, spoken by the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def expect(self, command: str) -> int:
        body = json.loads(await self.reader.readline())
        assert body["execute"] == command
        return int(body["id"])

    def send(self, **body: object) -> None:
        self.writer.write(json.dumps(body).encode() + b"\n")


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[tuple[qmp.QmpClient, Peer, list[Event]]]:
    ours, theirs = socket.socketpair()
    peer = Peer(*await asyncio.open_unix_connection(sock=theirs))
    peer.writer.write(GREETING)

    async def negotiate() -> None:
        peer.send(**{"return": {}, "id": await peer.expect("qmp_capabilities")})

    events: list[Event] = []
    greeting = asyncio.create_task(negotiate())
    try:
        async with qmp.connect(ours, on_event=events.append) as client:
            await greeting
            yield client, peer, events
    finally:
        peer.writer.close()
        await peer.writer.wait_closed()


async def test_answers_find_their_questions_in_any_order() -> None:
    async with session() as (client, peer, events):
        first = asyncio.create_task(client.execute("a"))
        one = await peer.expect("a")
        second = asyncio.create_task(client.execute("b"))
        two = await peer.expect("b")
        peer.send(event="STOP")
        peer.send(**{"return": "two", "id": two})
        peer.send(**{"return": "one", "id": one})
        assert (await first, await second) == ("one", "two")
        assert [event.name for event in events] == ["STOP"]
        assert client.version == "7.2.22"


async def test_a_refusal_is_an_error_with_its_class() -> None:
    async with session() as (client, peer, _):
        call = asyncio.create_task(client.execute("bad"))
        number = await peer.expect("bad")
        peer.send(id=number, error={"class": "CommandNotFound", "desc": "no such thing"})
        with pytest.raises(qmp.QmpError, match="no such thing") as caught:
            await call
        assert caught.value.error_class == "CommandNotFound"


async def test_a_late_answer_is_dropped_and_the_session_goes_on() -> None:
    async with session() as (client, peer, _):
        with pytest.raises(TimedOut, match="slow within"):
            await client.execute("slow", seconds=0.01)
        peer.send(**{"return": "late", "id": await peer.expect("slow")})
        call = asyncio.create_task(client.execute("next"))
        peer.send(**{"return": "now", "id": await peer.expect("next")})
        assert await call == "now"


@pytest.mark.parametrize("last", [b"", b"garbage\n"])
async def test_the_end_of_the_session_fails_what_waits_and_what_comes(last: bytes) -> None:
    async with session() as (client, peer, _):
        call = asyncio.create_task(client.execute("a"))
        await peer.expect("a")
        peer.writer.write(last)
        peer.writer.write_eof()
        with pytest.raises(Unavailable):
            await call
        await client.closed.wait()
        with pytest.raises(Unavailable):
            await client.execute("b")


async def test_a_peer_that_does_not_greet_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(TimedOut, match="did not greet"):
        async with qmp.connect(ours, seconds=0.01):
            pass


async def test_a_peer_that_ends_before_it_greets_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(Unavailable):
        async with qmp.connect(ours):
            pass
