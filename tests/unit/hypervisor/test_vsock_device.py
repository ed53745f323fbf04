"""The whole device with real sockets and descriptors; the machine and its guest are played by tests."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from services.hypervisor.vsock.device import Limits
from services.hypervisor.vsock.packet import HEADER_SIZE, HOST_CID, SHUTDOWN_BOTH, Header, Op
from services.hypervisor.vsock.vhost_user import (
    F_VERSION_1,
    FLAG_NEED_REPLY,
    HEADER,
    U64,
    VERSION,
    VRING_STATE,
    Request,
)
from tests.unit.hypervisor.vsock_rig import CID, PORT, REGIONS, Rig, recv

SMALL = Limits(
    streams=4,
    window=1 << 14,
    wide_streams=2,
    small_window=1 << 12,
    resets=4,
    retry_first_seconds=0.01,
    retry_most_seconds=0.02,
)


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A device whose guest's driver is up."""
    with Rig() as one:
        one.plug()
        one.start()
        yield one


@pytest.fixture
def small() -> Iterator[Rig]:
    """The same with bounds that a test can reach."""
    with Rig(SMALL) as one:
        one.plug()
        one.start()
        yield one


@contextlib.contextmanager
def hasty(*, fill: bool = True, **limits: Any) -> Iterator[Rig]:
    """A device with small bounds and with time limits that a test can wait for."""
    with Rig(dataclasses.replace(SMALL, **limits)) as one:
        one.plug()
        one.start(fill=fill)
        yield one


def said_until(rig: Rig, last: int) -> list[int]:
    """The operations of the packets up to one with `last`, letting the device's own timers run."""
    said: list[int] = []
    until = time.monotonic() + 20
    while last not in said:
        assert time.monotonic() < until, said
        said += [header.op for header, _ in rig.packets()]
        rig.loop.turn(0.02)
    rig.settle()
    return said


def run_until(rig: Rig, done: Callable[[], bool]) -> None:
    """Let the device's own timers run until `done`."""
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        rig.loop.turn(0.02)
    rig.settle()


def test_data_flows_both_ways(rig: Rig) -> None:
    client, port = rig.open()
    data = os.urandom(20000)
    client.sendall(data)
    rig.settle()
    packets = rig.packets()
    assert b"".join(payload for _, payload in packets) == data
    assert {header.op for header, _ in packets} == {Op.RW}
    assert max(header.length for header, _ in packets) == 4096 - HEADER_SIZE, "no more than a buffer holds"
    rig.send(Op.RW, port, data)
    assert recv(client) == data


def test_a_payload_may_be_spread_over_any_descriptors(rig: Rig) -> None:
    client, port = rig.open()
    header = Header(CID, HOST_CID, PORT, port, 10, 1, Op.RW, 0, 1 << 18, 0).encode()
    packet = header + b"0123456789"
    for cuts in ([1], [44], [43, 45], [10, 20, 30, 50], [54], list(range(1, 54))):
        places = []
        for number, (low, high) in enumerate(zip([0, *cuts], [*cuts, len(packet)], strict=True)):
            address = 0x80000 + 0x100 * number
            rig.transmit.poke(address, packet[low:high])
            places.append((address, high - low))
        rig.transmit.add(places, write=False)
        rig.kick(1)
        rig.transmit.collect()
        assert recv(client) == b"0123456789"


def test_receive_buffers_may_be_spread_over_any_descriptors() -> None:
    with Rig() as rig:
        rig.plug()
        rig.start(fill=False)
        rig.receive.add([(0x80000, 44), (0x90000, 100)], write=True)
        rig.kick(0)
        client = rig.dial()
        assert rig.receive.collect()[0][1] == HEADER_SIZE
        port = Header._make(struct.unpack("<QQIIIHHIII", rig.receive.peek(0x80000, 44))).src_port
        rig.send(Op.RESPONSE, port)
        client.sendall(b"x" * 150)
        rig.receive.add([(0x80000, 10), (0x88000, 40), (0xFFFC0, 128)], write=True)
        rig.receive.add([(0x80100, 44), (0x90000, 100)], write=True)
        rig.kick(0)
        assert [length for _, length in rig.receive.collect()] == [178, 60]
        assert rig.receive.peek(0xFFFC0, 128) == b"x" * 128


def test_interrupts_come_only_where_they_are_wanted(rig: Rig) -> None:
    _, port = rig.open()
    rig.interrupts(0), rig.interrupts(1)
    rig.send(Op.CREDIT_REQUEST, port)
    assert (rig.interrupts(0), rig.interrupts(1)) == (1, 1)
    rig.transmit.poke(rig.transmit.available, b"\1\0")
    rig.send(Op.CREDIT_REQUEST, port)
    assert (rig.interrupts(0), rig.interrupts(1)) == (1, 0)


def test_kicks_for_receive_buffers_are_asked_for_only_when_none_is_left() -> None:
    with Rig(queue_size=4) as rig:
        rig.plug()
        rig.start()
        assert rig.receive.peek(rig.receive.used, 2) == b"\1\0"
        client, _ = rig.open()
        client.sendall(b"x" * 60000)
        rig.settle()
        assert rig.receive.peek(rig.receive.used, 2) == b"\0\0"
        assert b"".join(payload for _, payload in rig.packets()) == b"x" * 60000


def test_everything_the_guest_opens_is_reset(rig: Rig) -> None:
    for port in (1, 22, 1024, 0x40000000):
        rig.send(Op.REQUEST, port)
        answer = rig.only(Op.RST)
        assert (answer.src_port, answer.dst_port, answer.src_cid, answer.dst_cid) == (port, PORT, 2, CID)


def test_packets_of_no_stream_are_reset_and_resets_are_not(rig: Rig) -> None:
    _, port = rig.open()
    rig.send(Op.RW, 7, b"data")
    assert rig.only(Op.RST).src_port == 7
    rig.send(Op.RST, 7)
    assert rig.packets() == []
    rig.send(Op.RW, port, b"data", type=2)
    assert rig.only(Op.RST).type == 2
    rig.send(Op.RW, port, b"data", dst_cid=99)
    assert rig.only(Op.RST).src_cid == 99
    rig.send(Op.RW, port, b"data", src_port=1)
    rig.only(Op.RST)
    rig.send(Op.RW, port, b"data", src_cid=99)
    assert rig.packets() == [], "a forged sender has no stream and gets no answer"


@pytest.mark.parametrize("size", [0, 1, 43])
def test_a_packet_without_a_header_is_dropped(rig: Rig, size: int) -> None:
    if size:
        rig.send_raw(b"x" * size)
    else:
        rig.transmit.describe(0, 0x5000, 0)
        rig.transmit.offer(0)
        rig.kick(1)
    assert rig.device.counters["dropped"] == 1
    assert rig.packets() == []


def test_a_stream_that_breaks_its_rules_is_reset_alone(rig: Rig) -> None:
    good, good_port = rig.open()
    for breach in ("length", "window", "request"):
        client, port = rig.open()
        if breach == "length":
            rig.send(Op.RW, port, b"short", length=1 << 31)
        elif breach == "window":
            for _ in range(5):
                rig.send(Op.RW, port, b"", length=0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            for _ in range(400):
                rig.send(Op.RW, port, b"x" * 4000)
        else:
            rig.send(Op.REQUEST, port)
        assert Op.RST in [header.op for header, _ in rig.packets()]
        assert rig.device.counters["streams_broken"] > 0
        while recv(client):
            pass
        assert recv(client) == b""
    rig.send(Op.RW, good_port, b"fine")
    assert recv(good) == b"fine"


def test_a_host_that_does_not_read_stops_only_its_stream(rig: Rig) -> None:
    slow, slow_port = rig.open()
    sent = 0
    granted = 1 << 18
    while sent < granted:
        rig.send(Op.RW, slow_port, b"s" * 4000)
        sent += 4000
        for header, _ in rig.packets():
            granted = header.fwd_cnt + header.buf_alloc - 4000
        assert rig.device.held_bytes <= 1 << 18
        assert sent < 4 << 20
    assert rig.device.held_bytes > 100000
    other, port = rig.open()
    rig.send(Op.RW, port, b"other")
    assert recv(other) == b"other"
    received = 0
    while data := recv(slow):
        received += len(data)
        rig.settle()
    assert received == sent
    assert rig.device.held_bytes == 0
    assert Op.CREDIT_UPDATE in [header.op for header, _ in rig.packets()]


def test_bytes_one_at_a_time_are_held_as_bytes(rig: Rig) -> None:
    """Not as one object each: a guest must not multiply what its window costs."""
    _, port = rig.open()
    for _ in range(60):
        rig.send(Op.RW, port, b"x" * 4000)
    held = rig.device.held_bytes
    for _ in range(500):
        rig.send(Op.RW, port, b"y")
    [stream] = rig.device._streams.values()
    assert rig.device.held_bytes == held + 500
    assert stream._outgoing.__sizeof__() < 2 * (held + 500) + 1000


def test_a_guest_without_credit_stops_only_its_stream(rig: Rig) -> None:
    client, port = rig.open(buf_alloc=5000)
    client.sendall(b"x" * 20000)
    rig.settle()
    packets = rig.packets()
    assert sum(header.length for header, _ in packets) == 5000
    assert packets[-1][0].op == Op.CREDIT_REQUEST
    other, other_port = rig.open()
    other.sendall(b"other")
    rig.settle()
    assert rig.packets()[0][0].src_port == other_port
    rig.send(Op.CREDIT_UPDATE, port, buf_alloc=5000, fwd_cnt=4000)
    assert sum(header.length for header, _ in rig.packets()) == 4000


def test_half_closes_pass_in_both_directions(rig: Rig) -> None:
    client, port = rig.open()
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    rig.settle()
    (_, words), (end, _) = rig.packets()
    assert words == b"last words"
    assert (end.op, end.flags) == (Op.SHUTDOWN, 2)
    rig.send(Op.RW, port, b"an answer")
    rig.send(Op.SHUTDOWN, port, flags=2)
    assert recv(client, 9) == b"an answer"
    assert recv(client) == b""
    assert rig.only(Op.SHUTDOWN).flags == SHUTDOWN_BOTH
    rig.send(Op.RST, port)
    assert rig.device.streams == 0


def test_a_guest_that_reads_no_more_makes_the_clients_writes_fail(rig: Rig) -> None:
    client, port = rig.open()
    rig.send(Op.SHUTDOWN, port, flags=1)
    with pytest.raises(BrokenPipeError):
        client.send(b"x")
    rig.send(Op.RW, port, b"still")
    assert recv(client) == b"still"


def test_a_client_that_reads_no_more_stops_the_guest(rig: Rig) -> None:
    client, port = rig.open()
    client.shutdown(socket.SHUT_RD)
    rig.send(Op.RW, port, b"nobody reads this")
    assert rig.only(Op.SHUTDOWN).flags == 1
    client.sendall(b"but this is read")
    rig.settle()
    assert rig.packets()[0][1] == b"but this is read"


def test_a_guests_close_delivers_what_it_sent_before(rig: Rig) -> None:
    client, port = rig.open()
    for _ in range(60):
        rig.send(Op.RW, port, b"x" * 4000)
    rig.send(Op.SHUTDOWN, port, flags=3)
    assert Op.RST in [header.op for header, _ in rig.packets()]
    received = 0
    while data := recv(client):
        received += len(data)
        rig.settle()
    assert data == b""
    assert received == 240000
    assert rig.device.streams == 0


def test_a_guests_reset_ends_the_client(rig: Rig) -> None:
    client, port = rig.open()
    rig.send(Op.RST, port)
    assert recv(client) == b""
    assert rig.device.streams == 0


def test_a_clients_close_is_confirmed_by_the_guest(rig: Rig) -> None:
    client, port = rig.open()
    client.sendall(b"bye")
    client.close()
    rig.settle()
    assert [(header.op, header.flags) for header, _ in rig.packets()] == [(Op.RW, 0), (Op.SHUTDOWN, 3)]
    assert rig.device.streams == 1
    rig.send(Op.RST, port)
    assert rig.device.streams == 0


def test_a_clients_reset_resets_the_stream(rig: Rig) -> None:
    """On a unix socket: closing with bytes unread."""
    client, port = rig.open()
    rig.send(Op.RW, port, b"unread")
    client.close()
    rig.settle()
    rig.only(Op.RST)
    assert rig.device.streams == 0


def test_an_end_that_the_guest_does_not_confirm_is_forced() -> None:
    with hasty(close_seconds=0.05) as rig:
        client, _ = rig.open()
        client.close()
        rig.settle()
        assert said_until(rig, Op.RST) == [Op.SHUTDOWN, Op.RST]
        assert rig.device.streams == 0


def test_a_client_that_nobody_answers_is_closed_in_time() -> None:
    with hasty(connect_seconds=0.05) as rig:
        client = rig.dial()
        assert said_until(rig, Op.RST) == [Op.REQUEST, Op.RST]
        assert recv(client) == b""


def test_a_refusal_before_the_agent_is_up_is_tried_again_until_the_time_is_up() -> None:
    with hasty(connect_seconds=0.5) as rig:
        client = rig.dial()
        asked = 0

        def ended() -> bool:
            nonlocal asked
            for header, _ in rig.packets():
                if header.op == Op.REQUEST:
                    asked += 1
                    rig.send(Op.RST, header.src_port)
            return recv(client) == b""

        run_until(rig, ended)
        assert asked >= 2


def test_a_refusal_after_the_agent_was_up_ends_the_client_at_once(rig: Rig) -> None:
    rig.open()
    client = rig.dial()
    rig.send(Op.RST, rig.only(Op.REQUEST).src_port)
    assert recv(client) == b""


def test_a_client_that_gives_up_waiting_leaves_nothing(rig: Rig) -> None:
    client = rig.dial()
    port = rig.only(Op.REQUEST).src_port
    client.close()
    rig.settle()
    rig.only(Op.RST)
    assert rig.device.streams == 0
    rig.send(Op.RESPONSE, port)
    rig.only(Op.RST)


def test_a_client_may_come_before_the_machine_and_write_at_once() -> None:
    with Rig() as rig:
        client = rig.dial()
        client.sendall(b"early")
        client.shutdown(socket.SHUT_WR)
        rig.plug()
        rig.start()
        port = rig.only(Op.REQUEST).src_port
        rig.send(Op.RESPONSE, port)
        assert [header.op for header, _ in rig.packets()] == [Op.RW, Op.SHUTDOWN]


def test_streams_beyond_the_limit_are_closed_and_places_come_back(small: Rig) -> None:
    opened = [small.open() for _ in range(4)]
    extra = small.dial()
    assert recv(extra) == b""
    assert small.device.counters["refused"] == 1
    windows = sorted(stream.connection.window for stream in small.device._streams.values())
    assert windows == [1 << 12, 1 << 12, 1 << 14, 1 << 14]
    for _, port in opened:
        small.send(Op.RST, port)
    small.open()


def test_answers_for_no_stream_are_bounded() -> None:
    """A guest that takes no packets cannot make us remember more and more of them."""
    with hasty(fill=False) as rig:
        for port in range(50):
            rig.send(Op.RW, port, b"x")
        assert len(rig.device._resets) == 4
        assert rig.device.counters["dropped"] == 46
        rig.refill()
        assert len(rig.packets()) == 4


def test_a_guest_that_gives_no_buffers_costs_only_its_bound() -> None:
    with hasty(fill=False, connect_seconds=1.0, close_seconds=0.05) as rig:
        clients = [rig.dial() for _ in range(6)]
        assert rig.device.counters["refused"] >= 2
        run_until(rig, lambda: rig.device.streams == 0)
        assert all(recv(client) == b"" for client in clients)


BREAKS = ("loop", "outside", "too many", "wrong way", "tiny")


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_queue_drops_its_streams_and_a_reset_serves_again(rig: Rig, how: str) -> None:
    client, _ = rig.open()
    queue, index = rig.transmit, 0 if how == "tiny" else 1
    if how == "loop":
        queue.describe(0, 0x5000, 16, 1, 0)
        queue.offer(0)
    elif how == "outside":
        queue.describe(0, 1 << 50, 16)
        queue.offer(0)
    elif how == "too many":
        queue.offer(0, index=(queue.index + queue.size + 1) & 0xFFFF)
    elif how == "wrong way":
        queue.describe(0, 0x5000, 16, 2)
        queue.offer(0)
    else:
        rig.stop()
        rig.reset_driver()
        rig.start(fill=False)
        client = rig.dial()
        rig.receive.add([(0x5000, 44)], write=True)
        rig.kick(0)
        port = Header._make(struct.unpack("<QQIIIHHIII", rig.receive.peek(0x5000, 44))).src_port
        rig.send(Op.RESPONSE, port)
        rig.receive.add([(0x5000, 44)], write=True)
        client.send(b"x")
    rig.kick(index)
    assert any("broke queue" in line for line in rig.logged)
    assert recv(client) == b""
    before = rig.space.touched
    rig.settle()
    rig.kick(index)
    assert rig.space.touched == before, "a broken queue is left alone"
    rig.stop()
    rig.reset_driver()
    rig.start()
    again, port = rig.open()
    rig.send(Op.RW, port, b"works")
    assert recv(again) == b"works"


def test_a_paused_machine_keeps_its_streams_and_a_reset_one_does_not(rig: Rig) -> None:
    client, port = rig.open()
    rig.send(Op.RW, port, b"one")
    bases = rig.stop()
    assert rig.states[-1] == "stopped"
    client.sendall(b"meanwhile")
    rig.settle()
    rig.start(bases, fill=False)
    assert rig.packets()[-1][1] == b"meanwhile"
    assert recv(client) == b"one"
    rig.stop()
    rig.reset_driver()
    rig.start()
    assert recv(client) == b""
    assert rig.device.streams == 0


def test_a_client_that_waits_survives_a_driver_reset(rig: Rig) -> None:
    rig.dial()
    first = rig.only(Op.REQUEST)
    rig.stop()
    rig.reset_driver()
    rig.start()
    assert rig.only(Op.REQUEST).src_port == first.src_port


def test_a_disabled_queue_is_left_alone(rig: Rig) -> None:
    rig.message(Request.SET_VRING_ENABLE, VRING_STATE.pack(1, 0))
    rig.send(Op.REQUEST, 9)
    assert rig.transmit.seen == 0
    rig.message(Request.SET_VRING_ENABLE, VRING_STATE.pack(1, 1))
    rig.only(Op.RST)


def test_the_machine_may_be_unplugged_and_plugged(rig: Rig) -> None:
    client, _ = rig.open()
    rig.unplug()
    assert rig.states[-1] == "disconnected"
    assert recv(client) == b""
    rig.reset_driver()
    rig.plug()
    rig.start()
    rig.open()


def test_memory_may_be_told_anew_while_queues_run(rig: Rig) -> None:
    client, port = rig.open()
    rig.memory_table()
    rig.send(Op.RW, port, b"x")
    assert recv(client) == b"x"
    # Without the queues' own memory there is nothing left to serve.
    rig.memory_table(REGIONS[1:])
    assert any("broke the vhost-user protocol" in line for line in rig.logged)
    assert recv(client) == b""


def test_only_the_machine_itself_may_connect(rig: Rig) -> None:
    with socket.socket(socket.AF_UNIX) as second:
        second.settimeout(5)
        second.connect(rig.vhost_path)
        rig.settle()
        assert second.recv(1) == b"", "there is one machine, and it is connected"
    pid = os.fork()
    if pid == 0:
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(rig.vhost_path)
            other.settimeout(10)
            os._exit(0 if other.recv(1) == b"" else 1)
    rig.unplug()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        rig.loop.turn(0.05)
    assert any(f"process {pid}" in line for line in rig.logged)


@pytest.mark.parametrize("bad", ["garbage", "flags", "half"])
def test_a_machine_that_breaks_the_protocol_is_dropped_and_may_come_again(rig: Rig, bad: str) -> None:
    client, _ = rig.open()
    if bad == "garbage":
        rig.raw(b"\xff" * 12)
    elif bad == "flags":
        rig.raw(HEADER.pack(Request.GET_FEATURES, 7, 0))
    else:
        rig.raw(HEADER.pack(Request.SET_MEM_TABLE, VERSION, 40), [rig.memory])
        rig.raw(b"x", [rig.memory])
    assert recv(client) == b""
    rig.unplug()
    rig.reset_driver()
    rig.plug()
    rig.start()
    rig.open()


def test_descriptors_are_never_kept(rig: Rig) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        for index in range(2):
            rig.message(Request.SET_VRING_CALL, U64.pack(index), [rig.memory])
            rig.message(Request.SET_VRING_ERR, U64.pack(index), [rig.kicks[0]])
            rig.message(Request.SET_VRING_CALL, U64.pack(index | 0x100))
            rig.message(Request.SET_VRING_ERR, U64.pack(index | 0x100))
        rig.memory_table()
        rig.message(Request.SET_VRING_KICK, U64.pack(0), [rig.kicks[0]])
    assert count() == before - 2, "the two interrupts that were taken away"
    # One that cannot be polled, and one that comes with a message that is refused.
    rig.message(Request.SET_VRING_KICK, U64.pack(0), [os.open("/dev/null", os.O_RDONLY)])
    rig.unplug()
    rig.plug()
    rig.message(Request.SET_OWNER, b"", [rig.memory, rig.memory])
    rig.unplug()
    assert rig.device.streams == 0


def test_a_kick_that_is_a_closed_pipe_does_not_spin(rig: Rig) -> None:
    read, write = os.pipe()
    rig.message(Request.SET_VRING_KICK, U64.pack(1), [read])
    os.close(read)
    os.close(write)
    rig.settle(turns=20)


def test_old_qemu_enables_queues_by_starting_them() -> None:
    with Rig() as rig:
        rig.plug(handshake=False)
        rig.handshake(features=F_VERSION_1)
        rig.start()
        rig.open()


def test_acknowledgements_are_given(rig: Rig) -> None:
    answer = rig.message(Request.SET_OWNER, flags=VERSION | FLAG_NEED_REPLY)
    assert answer is not None
    assert U64.unpack(answer[HEADER.size :]) == (0,)
