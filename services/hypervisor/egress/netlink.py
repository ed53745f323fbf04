"""Addresses and routes of an interface by rtnetlink(7), as far as a box's namespace needs them."""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import IPv4Interface, IPv6Interface

_RTM_NEWLINK, _RTM_NEWADDR = 16, 20
_REQUEST, _ACK, _CREATE, _EXCLUSIVE = 1, 4, 0x400, 0x200
_NLMSG_ERROR = 2
_IFA_ADDRESS, _IFA_LOCAL, _IFLA_ADDRESS = 1, 2, 1
_IFA_F_NODAD = 2
_IFF_UP = 1
_HEADER = struct.Struct("=IHHII")


class Route:
    """A session; a context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.bind((0, 0))

    def __enter__(self) -> Route:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def up(self, name: str, mac: bytes = b"") -> None:
        """Bring an interface up, with `mac` as its address if one is given.

        Raises:
            OSError: the kernel refuses.
        """
        index = socket.if_nametoindex(name)
        if mac:
            body = struct.pack("=BxHiII", 0, 0, index, 0, 0) + _attribute(_IFLA_ADDRESS, mac)
            self._ask(_RTM_NEWLINK, 0, body)
        self._ask(_RTM_NEWLINK, 0, struct.pack("=BxHiII", 0, 0, index, _IFF_UP, _IFF_UP))

    def add(self, name: str, address: IPv4Interface | IPv6Interface) -> None:
        """Give an interface an address, which can be used at once.

        Raises:
            OSError: the kernel refuses, e.g. EAFNOSUPPORT without IPv6.
        """
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        # Duplicate address detection would take a second, and nobody else is on this link.
        flags = _IFA_F_NODAD if address.version == 6 else 0
        head = struct.pack("=BBBBI", family, address.network.prefixlen, flags, 0, socket.if_nametoindex(name))
        packed = address.ip.packed
        body = head + _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
        self._ask(_RTM_NEWADDR, _CREATE | _EXCLUSIVE, body)

    def _ask(self, kind: int, flags: int, body: bytes) -> None:
        message = _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body
        self._socket.send(message)
        answer = self._socket.recv(4096)
        _, answered, *_ = _HEADER.unpack_from(answer)
        if answered == _NLMSG_ERROR:
            (number,) = struct.unpack_from("=i", answer, _HEADER.size)
            if number:
                raise OSError(-number, os.strerror(-number))


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
