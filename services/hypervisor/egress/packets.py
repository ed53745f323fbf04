"""What is neither TCP nor DNS: echo requests and datagrams, frame by frame, on the box's packet socket.

An echo request to what the box may reach is answered here; that says that it is allowed, not that the other
side lives. A datagram that a rule allows goes out by a socket of its own, and what comes back is put into a
frame. All else gets an ICMP "administratively prohibited" (RFC 1812 §5.2.7.1, RFC 4443 §3.1) and an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from services.common.egress.addresses import Address
from services.common.egress.policy import Decision, Protocol
from services.hypervisor.egress import link
from services.hypervisor.egress.audit import AuditLog, Event, EventKind
from services.hypervisor.egress.limits import Bucket

MAX_FLOWS = 256
FLOW_SECONDS = 120.0
"""RFC 4787 §4.3 asks for two minutes or more."""
EVENTS_PER_SECOND = 20
_IPV4, _IPV6 = 0x0800, 0x86DD
_ICMP, _UDP, _ICMP6 = 1, 17, 58
_ETHERNET = 14
_NEIGHBOURS = range(133, 138)
_MAX_FRAME = 65600

Decide = Callable[[Address, int, Protocol], Decision]


@dataclass(frozen=True, slots=True)
class Packet:
    """One IP packet of the box."""

    ethernet: bytes
    source: Address
    target: Address
    protocol: int
    payload: bytes
    header: bytes


def parse(frame: bytes) -> Packet | None:
    """The packet in an Ethernet frame; None if it is none, or a fragment."""
    if len(frame) < _ETHERNET + 20:
        return None
    kind = int.from_bytes(frame[12:14], "big")
    body = frame[_ETHERNET:]
    if kind == _IPV4:
        length = (body[0] & 15) * 4
        total = int.from_bytes(body[2:4], "big")
        if body[0] >> 4 != 4 or length < 20 or not length <= total <= len(body):
            return None
        if int.from_bytes(body[6:8], "big") & 0x3FFF:
            return None  # a fragment: nothing that is allowed here needs one
        return Packet(
            frame[:_ETHERNET],
            IPv4Address(body[12:16]),
            IPv4Address(body[16:20]),
            body[9],
            body[length:total],
            body[:length],
        )
    if kind == _IPV6 and len(body) >= 40 and body[0] >> 4 == 6:
        total = int.from_bytes(body[4:6], "big")
        if 40 + total > len(body):
            return None
        return Packet(
            frame[:_ETHERNET],
            IPv6Address(body[8:24]),
            IPv6Address(body[24:40]),
            body[6],
            body[40 : 40 + total],
            body[:40],
        )
    return None


def build(packet: Packet, protocol: int, source: Address, payload: bytes) -> bytes:
    """A frame back to whom `packet` came from."""
    ethernet = packet.ethernet[6:12] + packet.ethernet[:6] + packet.ethernet[12:14]
    if source.version == 4:
        head = struct.pack(
            "!BBHHHBBH4s4s",
            *(0x45, 0, 20 + len(payload), 0, 0x4000, 64, protocol, 0),
            source.packed,
            packet.source.packed,
        )
        return ethernet + head[:10] + _checksum(head) + head[12:] + payload
    head = struct.pack("!IHBB", 0x60000000, len(payload), protocol, 64) + source.packed + packet.source.packed
    return ethernet + head + payload


def echo_reply(packet: Packet) -> bytes:
    """The frame that answers an echo request."""
    if packet.protocol == _ICMP:
        body = b"\0\0\0\0" + packet.payload[4:]
        return build(packet, _ICMP, packet.target, b"\0\0" + _checksum(body) + body[4:])
    body = b"\x81\0\0\0" + packet.payload[4:]
    total = _checksum(_pseudo(packet.target, packet.source, _ICMP6, len(body)) + body)
    return build(packet, _ICMP6, packet.target, body[:2] + total + body[4:])


def prohibited(packet: Packet) -> bytes:
    """The frame that says that what `packet` asks for is administratively prohibited."""
    quoted = packet.header + packet.payload
    if packet.source.version == 4:
        body = b"\x03\x0d\0\0\0\0\0\0" + quoted[:548]
        return build(packet, _ICMP, link.GATEWAY.ip, body[:2] + _checksum(body) + body[4:])
    body = b"\x01\x01\0\0\0\0\0\0" + quoted[:1184]
    total = _checksum(_pseudo(link.GATEWAY6.ip, packet.source, _ICMP6, len(body)) + body)
    return build(packet, _ICMP6, link.GATEWAY6.ip, body[:2] + total + body[4:])


def datagram(packet: Packet, source: Address, source_port: int, data: bytes) -> bytes:
    """The frame with a datagram back to the port that `packet`, a datagram, came from."""
    to_port = int.from_bytes(packet.payload[:2], "big")
    head = struct.pack("!HHHH", source_port, to_port, 8 + len(data), 0)
    total = _checksum(_pseudo(source, packet.source, _UDP, len(head) + len(data)) + head + data)
    return build(packet, _UDP, source, head[:6] + (total if total != b"\0\0" else b"\xff\xff") + data)


def _pseudo(source: Address, target: Address, protocol: int, length: int) -> bytes:
    """RFC 768 and RFC 8200 §8.1."""
    if source.version == 4:
        return source.packed + target.packed + struct.pack("!BBH", 0, protocol, length)
    return source.packed + target.packed + struct.pack("!IHBB", length, 0, 0, protocol)


def _checksum(data: bytes) -> bytes:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2, "big")


class Packets:
    """Serves the packet socket, which it does not own, until `run` is cancelled."""

    def __init__(self, one: socket.socket, verdict: Decide, audit: AuditLog) -> None:
        self._socket = one
        self._verdict = verdict
        self._audit = audit
        self._events = Bucket(EVENTS_PER_SECOND, 10 * EVENTS_PER_SECOND)
        self._flows: OrderedDict[tuple[Address, int, int], _Flow] = OrderedDict()
        self._unsaid = 0

    async def run(self) -> None:
        """Answer or refuse each frame."""
        loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        try:
            while True:
                try:
                    frame = await loop.sock_recv(self._socket, _MAX_FRAME)
                except OSError:
                    await asyncio.sleep(0.1)  # ENETDOWN while the machine has no device
                    continue
                packet = parse(frame)
                if packet is not None:
                    self._take(packet)
        finally:
            for flow in list(self._flows.values()):
                flow.close()

    def send(self, frame: bytes) -> None:
        """Give the box a frame; one that does not fit is lost, as on any link."""
        with contextlib.suppress(OSError):
            self._socket.send(frame)

    def _take(self, packet: Packet) -> None:
        target, payload = packet.target, packet.payload
        if (
            target.is_multicast
            or target == IPv4Address("255.255.255.255")
            or target == IPv4Address("10.0.2.255")
        ):
            return  # announcements; nobody is there to hear them
        if packet.protocol == _ICMP6 and payload and payload[0] in _NEIGHBOURS:
            return
        if packet.protocol in (_ICMP, _ICMP6):
            if len(payload) < 8 or payload[0] != (8 if packet.protocol == _ICMP else 128):
                return  # an error is never answered by an error (RFC 1122 §3.2.2)
            own = target in (link.GATEWAY.ip, link.NAME_SERVER, link.GATEWAY6.ip, link.NAME_SERVER6)
            decision = Decision(allowed=True, rule="gateway") if own else self._verdict(target, 0, "tcp")
            self._say("icmp", target, 0, decision)
            self.send(echo_reply(packet) if decision.allowed else prohibited(packet))
            return
        if packet.protocol == _UDP and len(payload) >= 8:
            source_port, port = struct.unpack("!HH", payload[:4])
            key = (target, port, source_port)
            flow = self._flows.get(key)
            if flow is None:
                decision = self._verdict(target, port, "udp")
                self._say("udp", target, port, decision)
                if decision.allowed:
                    flow = self._open(key, packet)
            if flow is not None:
                self._flows.move_to_end(key)
                flow.send(packet, payload[8:])
                return
        else:
            self._say("udp", target, 0, Decision(allowed=False, reason=f"IP protocol {packet.protocol}"))
        self.send(prohibited(packet))

    def _open(self, key: tuple[Address, int, int], packet: Packet) -> _Flow | None:
        if len(self._flows) >= MAX_FLOWS:
            next(iter(self._flows.values())).close()
        try:
            flow = _Flow(self, key, packet)
        except OSError:
            return None
        self._flows[key] = flow
        return flow

    def forget(self, key: tuple[Address, int, int]) -> None:
        """A flow has ended."""
        self._flows.pop(key, None)

    def _say(self, kind: EventKind, target: Address, port: int, decision: Decision) -> None:
        if not self._events.has(1):
            self._unsaid += 1
            return
        detail = {"unsaid": self._unsaid} if self._unsaid else {}
        self._unsaid = 0
        self._audit.record(
            Event(
                kind=kind,
                allowed=decision.allowed,
                address=str(target),
                port=port,
                rule=decision.rule,
                reason=decision.reason,
                detail=detail,
            )
        )


class _Flow:
    """Datagrams between one port of the box and one port of the world."""

    def __init__(self, owner: Packets, key: tuple[Address, int, int], packet: Packet) -> None:
        self._owner = owner
        self._key = key
        self._packet = packet
        self._loop = asyncio.get_running_loop()
        family = socket.AF_INET if key[0].version == 4 else socket.AF_INET6
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._socket.connect((str(key[0]), key[1]))
        except OSError:
            self._socket.close()
            raise
        self._loop.add_reader(self._socket.fileno(), self._received)
        self._timer = self._loop.call_later(FLOW_SECONDS, self.close)

    def send(self, packet: Packet, data: bytes) -> None:
        """Pass a datagram of the box on."""
        self._packet = packet
        self._rest()
        with contextlib.suppress(OSError):
            self._socket.send(data)

    def _received(self) -> None:
        try:
            data = self._socket.recv(65535)
        except OSError:
            return
        self._rest()
        self._owner.send(datagram(self._packet, self._key[0], self._key[1], data))

    def _rest(self) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(FLOW_SECONDS, self.close)

    def close(self) -> None:
        """End it. Idempotent."""
        self._timer.cancel()
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        self._owner.forget(self._key)
