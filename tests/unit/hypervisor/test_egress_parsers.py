"""What boxes send is read by parsers that take any bytes: a result, a need for more, or one kind of error.

Cut at any byte, the result is the same; no input makes them raise anything else.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.egress import plain
from services.common.egress.policy import Limits, Policy, make_rule
from services.common.egress.text import parse_rule
from services.hypervisor.egress import host_network, packets
from services.hypervisor.egress.audit import AuditLog
from services.hypervisor.egress.clienthello import BadHello, Hello, parse_hello
from services.hypervisor.egress.dnsserver import NameServer
from services.hypervisor.egress.gateway_seccomp import program
from services.hypervisor.egress.httphead import BadHead, Requests, is_http
from services.hypervisor.egress.limits import Meter, QuotaExhausted
from services.hypervisor.egress.name_memory import SYNTHETIC, NameMemory
from services.hypervisor.egress.packet_filter import packet_filter
from services.hypervisor.egress.relay import Pipes, both, pump
from services.hypervisor.egress.resolver import Resolver, parse_hosts
from services.hypervisor.egress.upstream import NoProxy, parse_proxy


def vector(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size, "big") + data


def hello(
    name: bytes | None, *, alpn: tuple[bytes, ...] = (), ech: bool = False, record: int = 1 << 14
) -> bytes:
    extensions = b""
    if name is not None:
        extensions += b"\0\0" + vector(2, vector(2, b"\0" + vector(2, name)))
    if alpn:
        extensions += b"\0\x10" + vector(2, vector(2, b"".join(vector(1, each) for each in alpn)))
    if ech:
        extensions += b"\xfe\x0d" + vector(2, bytes(32))
    body = (
        b"\x03\x03" + bytes(32) + vector(1, b"") + vector(2, b"\x13\x01") + b"\x01\0" + vector(2, extensions)
    )
    message = b"\x01" + vector(3, body)
    pieces = [message[at : at + record] for at in range(0, len(message), record)]
    return b"".join(b"\x16\x03\x01" + vector(2, piece) for piece in pieces)


@given(st.integers(1, 200), st.booleans())
def test_a_hello_is_read_whole_however_it_is_cut(record: int, ech: bool) -> None:
    data = hello(b"A.Example", alpn=(b"h2", b"http/1.1"), ech=ech, record=record)
    wanted = Hello("a.example", ("h2", "http/1.1"), ech)
    assert parse_hello(data) == wanted
    assert parse_hello(data + b"more") == wanted
    for end in range(len(data)):
        assert parse_hello(data[:end]) is None


@given(st.binary(max_size=400), st.integers(0, 300), st.binary(max_size=8))
@settings(max_examples=300)
def test_any_bytes_are_a_hello_or_need_more_or_are_bad(data: bytes, at: int, patch: bytes) -> None:
    good = bytearray(hello(b"a.example", alpn=(b"h2",), record=50))
    good[at : at + len(patch)] = patch
    for each in (data, b"\x16\x03\x01" + data, bytes(good)):
        try:
            found = parse_hello(each)
        except BadHello:
            continue
        assert found is None or isinstance(found, Hello)


@pytest.mark.parametrize("name", [b"", b"1.2.3.4", b"a\0.b", b"a b", b"x" * 300, b"\xff"])
def test_a_server_name_that_is_none_is_bad(name: bytes) -> None:
    with pytest.raises(BadHello):
        parse_hello(hello(name))


GET = b"GET /x HTTP/1.1\r\nHost: A.Example:8080\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: b.example\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"PUT / HTTP/1.1\r\nHost: c.example\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED += b"3;x=y\r\nabc\r\n0\r\nT: 1\r\n\r\n"


@given(st.lists(st.integers(0, 400), max_size=12))
def test_each_request_of_a_connection_is_seen_however_it_is_cut(cuts: list[int]) -> None:
    data = GET + POST + CHUNKED + GET
    requests = Requests()
    heads = []
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    for start, end in zip([0, *ends], ends, strict=False):
        heads += requests.feed(data[start:end])
    assert [head.host for head in heads] == ["a.example", "b.example", "c.example", "a.example"]


@given(st.binary(max_size=300), st.integers(0, 200), st.binary(max_size=6))
@settings(max_examples=300)
def test_any_bytes_are_requests_or_bad(data: bytes, at: int, patch: bytes) -> None:
    changed = bytearray(GET + CHUNKED)
    changed[at : at + len(patch)] = patch
    for each in (data, GET + data, bytes(changed)):
        if each:
            is_http(each)
        try:
            Requests().feed(each)
        except BadHead:
            continue


@pytest.mark.parametrize(
    "head",
    [
        "GET / HTTP/1.1\r\nHost: a.b\r\nHost: c.d\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.b\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.b\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.b\r\nContent-Length: +1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.b\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : a.b\r\n\r\n",
        "GET / HTTP/1.1\r\n Host: a.b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.b\n\r\n\r\n",
        "GET http://c.d/ HTTP/1.1\r\nHost: a.b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.b@c.d\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.b/c\r\n\r\n",
        "GET / HTTP/2.0\r\nHost: a.b\r\n\r\n",
    ],
)
def test_what_two_programs_could_read_in_two_ways_is_refused(head: str) -> None:
    with pytest.raises(BadHead):
        Requests().feed(head.encode())


def server(policy: Policy) -> NameServer:
    resolver = Resolver("", "192.0.2.7 a.example\n127.0.0.1 local.example\n")
    return NameServer(policy, resolver, NameMemory(), AuditLog(-1, "b"), own=lambda _address: False)


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_any_bytes_are_a_question_or_are_not_answered(data: bytes) -> None:
    for each in (data, b"\0\1\1\0\0\1\0\0\0\0\0\0" + data):
        for tcp in (False, True):
            answer = asyncio.run(server(Policy(enabled=True)).answer(each, tcp=tcp))
            assert answer == b"" or answer[:2] == each[:2]


async def test_a_name_at_loopback_is_given_a_stand_in() -> None:
    rule = make_rule(host="*.example", addresses=["127.0.0.0/8", "192.0.2.0/24"])
    found = await server(Policy(enabled=True, allow=(rule,))).lookup("local.example")
    assert not isinstance(found, str)
    assert found is not None
    (address,) = found.addresses
    assert address in SYNTHETIC
    memory = NameMemory()
    assert memory.synthetic("local.example", [ip_address("127.0.0.1")]) == address
    assert memory.real(address) == (ip_address("127.0.0.1"),)


@given(st.binary(max_size=200), st.sampled_from([b"", bytes(12) + b"\x08\0", bytes(12) + b"\x86\xdd"]))
@settings(max_examples=300)
def test_any_frame_is_a_packet_or_none_and_can_be_refused(data: bytes, head: bytes) -> None:
    packet = packets.parse(head + data)
    if packet is not None:
        again = packets.parse(packets.prohibited(packet))
        assert again is not None
        assert again.target == packet.source
        assert packets._checksum(again.header) == b"\0\0" or again.source.version == 6


def test_the_filter_sees_all_but_tcp_and_dns() -> None:
    code = packet_filter()
    lines = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]

    def taken(frame: bytes) -> bool:
        at = value = index = 0
        while True:
            operation, true, false, constant = lines[at]
            at += 1
            if operation == 0x06:
                return bool(constant)
            if operation in (0x28, 0x48):
                start = constant + (index if operation == 0x48 else 0)
                value = int.from_bytes(frame[start : start + 2], "big")
            elif operation == 0x30:
                value = frame[constant]
            elif operation == 0xB1:
                index = 4 * (frame[constant] & 15)
            else:
                hit = value == constant if operation == 0x15 else bool(value & constant)
                at += true if hit else false

    def four(protocol: int, port: int = 0, fragment: int = 0, words: int = 5) -> bytes:
        head = bytes([0x40 | words, 0, 0, 60, 0, 0]) + fragment.to_bytes(2, "big") + bytes([64, protocol])
        return (
            bytes(12)
            + b"\x08\0"
            + head.ljust(words * 4, b"\0")
            + b"\0\0"
            + port.to_bytes(2, "big")
            + bytes(9)
        )

    def six(protocol: int, port: int = 0) -> bytes:
        return (
            bytes(12)
            + b"\x86\xdd"
            + bytes(6)
            + bytes([protocol])
            + bytes(33)
            + b"\0\0"
            + port.to_bytes(2, "big")
        )

    dropped = [
        four(6, 80),
        four(17, 53),
        four(17, 53, words=8),
        six(6, 80),
        six(17, 53),
        bytes(12) + b"\x08\x06",
    ]
    assert not any(taken(frame + bytes(40)) for frame in dropped)
    shown = [four(17, 443), four(17, 53, fragment=100), four(1), four(47), six(17, 443), six(58), six(44)]
    assert all(taken(frame + bytes(40)) for frame in shown)


@given(st.text(max_size=60))
def test_any_text_is_a_rule_or_says_what_is_wrong(text: str) -> None:
    try:
        rule = make_rule(**parse_rule(text))
    except ValueError:
        return
    policy = Policy(enabled=True, allow=(rule,), limits=Limits(total_bytes=5))
    assert plain.from_json(plain.to_json(policy)) == policy


async def test_bytes_go_both_ways_with_half_closed_sides_and_are_counted() -> None:
    box, inner = socket.socketpair()
    outer, world = socket.socketpair()
    for each in (box, inner, outer, world):
        each.setblocking(False)
    pipes = Pipes()
    counts = [0, 0]

    async def out(number: int) -> None:
        counts[0] += number

    async def back(number: int) -> None:
        counts[1] += number

    loop = asyncio.get_running_loop()
    moving = asyncio.create_task(both(pump(inner, outer, pipes, out), pump(outer, inner, pipes, back)))
    data = bytes(range(256)) * 8192

    async def read(one: socket.socket) -> bytes:
        found = b""
        while piece := await loop.sock_recv(one, 1 << 16):
            found += piece
        return found

    async def send() -> None:
        await loop.sock_sendall(box, data)
        box.shutdown(socket.SHUT_WR)

    sending = asyncio.create_task(send())
    assert await read(world) == data
    await sending
    await loop.sock_sendall(world, b"late answer")
    world.close()
    assert await read(box) == b"late answer"
    await moving
    assert counts == [len(data), len(b"late answer")]
    for each in (box, inner, outer):
        each.close()
    pipes.close()


async def test_limits_name_themselves_and_bytes_end_at_the_quota() -> None:
    meter = Meter(Limits(connections=1, new_per_second=2, total_bytes=10))
    assert meter.refusal() == ""
    meter.open = 1
    assert "limits.connections" in meter.refusal()
    meter.open = 0
    assert meter.refusal() == ""
    assert "limits.new_per_second" in meter.refusal()
    with pytest.raises(QuotaExhausted):
        await meter.used(10)
    assert "limits.total_bytes" in meter.refusal()


def test_addresses_and_names_are_remembered_together_and_bounded() -> None:
    memory = NameMemory()
    one = ip_address("192.0.2.1")
    memory.add("a.example", [one], 1)
    memory.add("b.example", [one], 1)
    assert memory.names(one) == {"a.example", "b.example"}
    assert memory.addresses("a.example") == [one]
    for number in range(9000):
        memory.add(f"n{number}.example", [ip_address(number + (11 << 24))], 1)
    assert memory.names(one) == frozenset()


def test_what_goes_directly_in_spite_of_a_proxy() -> None:
    direct = NoProxy(["corp.example", ".inner.example", "10.0.0.0/8", "192.0.2.1"])
    assert direct.covers("a.corp.example", None)
    assert direct.covers("a.inner.example", None)
    assert direct.covers("", ip_address("10.1.1.1"))
    assert not direct.covers("notcorp.example", ip_address("192.0.2.2"))
    assert NoProxy(["*"]).covers("any.example", None)
    proxy = parse_proxy("http://user:p%40ss@proxy.example:8080")
    assert proxy is not None
    assert (proxy.host, proxy.port, proxy.password) == ("proxy.example", 8080, "p@ss")
    assert "p@ss" not in repr(proxy)
    assert parse_proxy("") is None
    with pytest.raises(ValueError):
        parse_proxy("ftp://proxy.example")


def test_hosts_files_are_read_as_libc_reads_them() -> None:
    found = parse_hosts("# x\n127.0.0.1 localhost a.Example # c\nbad b.example\n::1 a.example\n")
    assert found["a.example"] == (ip_address("127.0.0.1"), ip_address("::1"))
    assert "b.example" not in found


def test_the_gateways_filter_is_made_for_each_known_processor() -> None:
    for machine in ("x86_64", "aarch64"):
        assert len(program(machine)) % 8 == 0


async def test_a_host_without_a_tun_device_is_told_the_cure(tmp_path: Path) -> None:
    assert "modprobe tun" in await host_network.find(str(tmp_path / "tun"))
