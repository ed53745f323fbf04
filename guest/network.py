"""The box's network device: found by its address, set up without DHCP, by rtnetlink(7).

It may be plugged in while it is waited for; the kernel tells of it on the same socket that asks.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import struct
import time
from dataclasses import dataclass

from guest.errors import AgentError, Code, invalid
from guest.identity import replace_file
from guest.root import Root

DEVICE_SECONDS = 30.0
_NETLINK_ROUTE = 0
_GROUP_LINK = 1
_RTM_NEWLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_NEWROUTE = 16, 18, 20, 24
_REQUEST, _ACK, _DUMP, _CREATE, _REPLACE = 1, 4, 0x300, 0x400, 0x100
_ERROR, _DONE = 2, 3
_IFLA_ADDRESS, _IFLA_IFNAME = 1, 3
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD = 2
_RTA_OIF, _RTA_GATEWAY = 4, 5
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_UNICAST = 254, 4, 1
_IFF_UP = 1
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_PING_GROUPS = "/proc/sys/net/ipv4/ping_group_range"


@dataclass(frozen=True)
class Wanted:
    """What the device shall have. Addresses have a prefix length; empty: none."""

    mac: str
    address: str
    gateway: str
    name_servers: tuple[str, ...]
    address6: str = ""
    gateway6: str = ""


def configure(wanted: Wanted, root: Root) -> None:
    """Set the device up and name the servers in resolv.conf; again does no harm.

    Raises:
        AgentError: INVALID_ARGUMENT for what is no address; UNAVAILABLE if the device does not come.
        OSError: the kernel refuses.
    """
    try:
        mac = bytes.fromhex(wanted.mac.replace(":", ""))
        pairs = [
            (ipaddress.ip_interface(address), ipaddress.ip_address(gateway))
            for address, gateway in ((wanted.address, wanted.gateway), (wanted.address6, wanted.gateway6))
            if address
        ]
        servers = [str(ipaddress.ip_address(each)) for each in wanted.name_servers]
    except ValueError as error:
        raise invalid(f"network: {error}", reason="BAD_ADDRESS") from None
    if len(mac) != 6:
        raise invalid(f"{wanted.mac!r} is no MAC address", reason="BAD_ADDRESS")
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as netlink:
        netlink.bind((0, _GROUP_LINK))
        index = _wait_for(netlink, mac)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as netlink:
        netlink.bind((0, 0))
        _ask(netlink, _RTM_NEWLINK, 0, _LINK.pack(0, 0, index, _IFF_UP, _IFF_UP))
        for interface, gateway in pairs:
            family = socket.AF_INET if interface.version == 4 else socket.AF_INET6
            # Nobody else is on this link, and duplicate address detection takes a second.
            flags = _IFA_F_NODAD if interface.version == 6 else 0
            packed = interface.ip.packed
            head = struct.pack("=BBBBI", family, interface.network.prefixlen, flags, 0, index)
            body = head + _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
            _ask(netlink, _RTM_NEWADDR, _CREATE | _REPLACE, body)
            head = struct.pack(
                "=BBBBBBBBI", family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, 0, _RTN_UNICAST, 0
            )
            oif = _attribute(_RTA_OIF, struct.pack("=i", index))
            body = head + _attribute(_RTA_GATEWAY, gateway.packed) + oif
            _ask(netlink, _RTM_NEWROUTE, _CREATE | _REPLACE, body)
    _allow_ping()
    replace_file(root, "/etc/resolv.conf", "".join(f"nameserver {each}\n" for each in servers), 0o644)


def _wait_for(netlink: socket.socket, mac: bytes) -> int:
    """The index of the device with this address, as soon as there is one."""
    request = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
    netlink.send(_HEADER.pack(_HEADER.size + len(request), _RTM_GETLINK, _REQUEST | _DUMP, 1, 0) + request)
    until = time.monotonic() + DEVICE_SECONDS
    while (left := until - time.monotonic()) > 0:
        if not select.select([netlink], [], [], left)[0]:
            break
        data = netlink.recv(1 << 16)
        while len(data) >= _HEADER.size:
            length, kind, *_ = _HEADER.unpack_from(data)
            if length < _HEADER.size or length > len(data):
                break
            if kind == _RTM_NEWLINK:
                _, _, index, _, _ = _LINK.unpack_from(data, _HEADER.size)
                if _attributes(data[_HEADER.size + _LINK.size : length]).get(_IFLA_ADDRESS) == mac:
                    return int(index)
            data = data[(length + 3) & ~3 :]
    raise AgentError(
        Code.UNAVAILABLE,
        "NO_NETWORK_DEVICE",
        f"no network device {mac.hex(':')} within {DEVICE_SECONDS:g} s; the guest's kernel needs virtio_net",
    )


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if not 4 <= length <= len(data):
            break
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _ask(netlink: socket.socket, kind: int, flags: int, body: bytes) -> None:
    netlink.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body)
    answer = netlink.recv(1 << 16)
    if _HEADER.unpack_from(answer)[1] == _ERROR:
        (number,) = struct.unpack_from("=i", answer, _HEADER.size)
        if number:
            raise OSError(-number, os.strerror(-number))


def _allow_ping() -> None:
    """Let every user ask for an echo, without a privileged program."""
    try:
        with open(_PING_GROUPS, "w") as file:
            file.write("0 2147483647")
    except OSError:
        return  # a kernel without
