"""Messages between PID 1 and the agent: dictionaries over a SOCK_SEQPACKET socketpair.

Both ends are the same trusted program, forked one from the other, so `marshal` is safe
and costs no import. A message that is too long for a packet travels in a memfd, which is
the last of the file descriptors that go with it.
"""

from __future__ import annotations

import array
import marshal
import os
import socket
from typing import Any

Message = dict[str, Any]

_IN_PACKET = 32768  # the default SO_SNDBUF of 212992 holds several of these
_MAX_FDS = 4


def send(channel: socket.socket, message: Message, fds: tuple[int, ...] = ()) -> None:
    """Send one message and duplicates of `fds`.

    Raises:
        BlockingIOError: the channel is non-blocking and full.
        OSError: the peer is gone.
    """
    body = marshal.dumps(message)
    if len(body) <= _IN_PACKET:
        _send_packet(channel, b"P" + body, fds)
        return
    memory = os.memfd_create("message", os.MFD_CLOEXEC)
    try:
        view = memoryview(body)
        while view:
            view = view[os.write(memory, view) :]
        _send_packet(channel, b"M", (*fds, memory))
    finally:
        os.close(memory)


def receive(channel: socket.socket) -> tuple[Message, list[int]] | None:
    """The next message and the file descriptors that came with it; None at the end.

    Raises:
        BlockingIOError: the channel is non-blocking and empty.
    """
    room = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
    packet, control, _, _ = channel.recvmsg(_IN_PACKET + 1, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    passed = fds.tolist()
    if not packet:
        return None
    body = packet[1:]
    if packet[:1] == b"M":
        memory = passed.pop()
        try:
            body = os.pread(memory, os.fstat(memory).st_size, 0)
        finally:
            os.close(memory)
    message: Message = marshal.loads(body)  # noqa: S302 - our own parent or child
    return message, passed


def _send_packet(channel: socket.socket, packet: bytes, fds: tuple[int, ...]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    channel.sendmsg([packet], rights)
