"""The header of every virtio-vsock packet (virtio 1.2, section 5.10.6)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

STRUCT = struct.Struct("<QQIIIHHIII")
HEADER_SIZE = STRUCT.size
"""44 bytes; the payload follows without padding."""

HOST_CID = 2
TYPE_STREAM = 1
COUNTER_MASK = 0xFFFFFFFF
"""Every byte counter wraps at 32 bits."""

SHUTDOWN_RECEIVE = 1
SHUTDOWN_SEND = 2
SHUTDOWN_BOTH = 3


class Op(IntEnum):
    """What a packet means."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Header(NamedTuple):
    """A packet's header, in wire order."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    def encode(self) -> bytes:
        """The 44 bytes on the wire."""
        return STRUCT.pack(*self)


def decode(data: bytes | bytearray | memoryview) -> Header:
    """The header in the first 44 bytes of `data`."""
    return Header._make(STRUCT.unpack_from(data))


def reset_for(header: Header) -> Header | None:
    """The RST that answers a packet which belongs to no stream; None if it was one itself."""
    if header.op == Op.RST:
        return None
    return Header(
        header.dst_cid, header.src_cid, header.dst_port, header.src_port, 0, header.type, Op.RST, 0, 0, 0
    )
