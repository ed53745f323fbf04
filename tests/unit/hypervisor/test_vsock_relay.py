"""The relay for hosts whose kernel serves vsock. Its guest here is a unix socket: what differs with
AF_VSOCK is only the address that is dialled, which needs `/dev/vhost-vsock` to be tried for real."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator

import pytest

from services.hypervisor.vsock.loop import Loop
from services.hypervisor.vsock.relay import VsockRelay, vsock_dialer
from tests.unit.hypervisor.vsock_rig import recv


class Bench:
    """A relay between a client's socket and a guest that the test plays."""

    def __init__(self, directory: str, **options: float) -> None:
        self.loop = Loop()
        self.socks: list[socket.socket] = []
        self.client_path, self.guest_path = f"{directory}/client", f"{directory}/guest"
        self.listener = self._listen(self.client_path)
        self.guest = self._listen(self.guest_path)
        self.refusals = 0
        self.dialled = 0
        self.relay = VsockRelay(self.loop, guest_listener=self.listener, dial=self._dial, **options)  # type: ignore[arg-type]

    def _listen(self, path: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        sock.listen(64)
        sock.setblocking(False)
        self.socks.append(sock)
        return sock

    def _dial(self) -> socket.socket:
        self.dialled += 1
        if self.refusals:
            self.refusals -= 1
            raise ConnectionResetError(errno.ECONNRESET, "refused")
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.guest_path)
        sock.setblocking(False)
        return sock

    def settle(self, turns: int = 500) -> None:
        """Turn until nothing happens; the relay must come to rest by itself."""
        for _ in range(turns):
            before = self.loop.events
            if not self.loop.turn(0) and self.loop.events == before:
                return
        raise AssertionError("the relay is still busy")

    def client(self) -> socket.socket:
        """A client whose stream has been dialled."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.client_path)
        sock.setblocking(False)
        self.socks.append(sock)
        self.settle()
        return sock

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A client and the guest's end of its stream."""
        client = self.client()
        guest, _ = self.guest.accept()
        guest.setblocking(False)
        self.socks.append(guest)
        self.settle()
        return client, guest


@pytest.fixture
def bench(tmp_path: object) -> Iterator[Bench]:
    one = Bench(str(tmp_path))
    yield one
    for sock in one.socks:
        sock.close()
    one.settle()
    assert one.relay.streams == 0, "streams outlived both their ends"


def pump(bench: Bench, source: socket.socket, sink: socket.socket, data: bytes) -> bytes:
    """Send all of `data` and return what arrived."""
    sent, arrived = 0, bytearray()
    while len(arrived) < len(data):
        with contextlib.suppress(BlockingIOError):
            sent += source.send(data[sent : sent + 100000])
        bench.settle()
        while piece := recv(sink):
            arrived += piece
    return bytes(arrived)


def test_bytes_pass_both_ways(bench: Bench) -> None:
    client, guest = bench.pair()
    data = os.urandom(3 << 20)
    assert pump(bench, client, guest, data) == data
    assert pump(bench, guest, client, data) == data


def test_each_direction_ends_on_its_own(bench: Bench) -> None:
    client, guest = bench.pair()
    client.send(b"question")
    client.shutdown(socket.SHUT_WR)
    bench.settle()
    assert recv(guest, 8) == b"question"
    assert recv(guest) == b""
    guest.send(b"answer")
    guest.close()
    bench.settle()
    assert recv(client, 6) == b"answer"
    assert recv(client) == b""
    assert bench.relay.streams == 0


@pytest.mark.parametrize("who", ["client", "guest"])
def test_a_side_that_breaks_off_ends_both(bench: Bench, who: str) -> None:
    client, guest = bench.pair()
    gone, left = (client, guest) if who == "client" else (guest, client)
    left.send(b"unread")
    bench.settle()
    gone.close()
    bench.settle()
    assert recv(left) == b""
    left.close()
    bench.settle()
    assert bench.relay.streams == 0


@pytest.mark.parametrize("towards", ["client", "guest"])
def test_a_side_that_does_not_read_stops_only_its_stream(bench: Bench, towards: str) -> None:
    client, guest = bench.pair()
    source = guest if towards == "client" else client
    sent = 0
    while True:
        try:
            sent += source.send(bytes(65536))
        except BlockingIOError:
            break
        bench.settle()
        assert sent < 8 << 20
    bench.settle(turns=5)
    other, far = bench.pair()
    assert pump(bench, other, far, b"other") == b"other"
    sink = client if towards == "client" else guest
    received = 0
    while piece := recv(sink):
        received += len(piece)
        bench.settle()
    assert received == sent


def test_a_guest_that_is_still_starting_is_tried_again(bench: Bench) -> None:
    bench.refusals = 3
    client = bench.client()
    client.send(b"early")
    while bench.dialled < 4:
        bench.loop.turn(1)
    bench.settle()
    guest, _ = bench.guest.accept()
    bench.socks.append(guest)
    bench.settle()
    assert guest.recv(5) == b"early"


def test_a_guest_that_was_up_and_refuses_ends_the_client(bench: Bench) -> None:
    bench.pair()
    bench.refusals = 1
    assert recv(bench.client()) == b""


def test_a_guest_that_never_answers_ends_the_client_in_time(tmp_path: object) -> None:
    bench = Bench(str(tmp_path), connect_seconds=0.1)
    bench.refusals = 1000
    client = bench.client()
    until = time.monotonic() + 10
    while recv(client) is None:
        assert time.monotonic() < until
        bench.loop.turn(0.2)
    assert bench.relay.streams == 0
    for sock in bench.socks:
        sock.close()


def test_a_client_that_gives_up_waiting_leaves_nothing(bench: Bench) -> None:
    bench.refusals = 1000
    client = bench.client()
    client.close()
    bench.settle()
    assert bench.relay.streams == 0


def test_clients_beyond_the_limit_are_closed(tmp_path: object) -> None:
    bench = Bench(str(tmp_path), streams=2)
    bench.pair(), bench.pair()
    assert recv(bench.client()) == b""
    assert bench.relay.refused == 1
    for sock in bench.socks:
        sock.close()
    bench.settle()
    assert bench.relay.streams == 0


def test_idle_streams_cost_nothing(bench: Bench) -> None:
    client, guest = bench.pair()
    client.shutdown(socket.SHUT_WR)
    bench.settle()
    before = bench.loop.events
    bench.loop.turn(0.05)
    assert bench.loop.events == before
    assert guest.fileno() >= 0


def test_the_real_dialler_makes_a_vsock_socket_that_does_not_block() -> None:
    # Not every kernel has vsock at all, and not every one a way to CID 3.
    with contextlib.suppress(OSError), vsock_dialer(3)() as sock:
        assert sock.family == socket.AF_VSOCK
        assert sock.gettimeout() == 0
