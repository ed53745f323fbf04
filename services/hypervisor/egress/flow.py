"""One connection of a box through its gateway, and who may take it over before it is passed on."""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from services.common.egress.policy import Decision

Kind = Literal["tls", "http", "other"]


@dataclass(slots=True, kw_only=True)
class Flow:
    """A TCP connection that a box has made.

    Attributes:
        box: Its box's id.
        source: Address and port in the box.
        destination: Address and port that the box asked for.
        name: The name that was decided by: the claimed one, else one that the address was given for.
        sni: The name in its TLS hello; empty without one.
        host: The name in its HTTP head; empty without one.
        alpn: Protocols that its TLS hello offers.
        kind: What its first bytes are.
        decision: What the policy says.
        sent: Bytes from the box so far.
        received: Bytes to the box so far.
        started: `time.monotonic()` when it was accepted.
    """

    box: str
    source: tuple[str, int]
    destination: tuple[str, int]
    name: str = ""
    sni: str = ""
    host: str = ""
    alpn: tuple[str, ...] = ()
    kind: Kind = "other"
    decision: Decision = field(default_factory=lambda: Decision(allowed=False))
    sent: int = 0
    received: int = 0
    started: float = field(default_factory=time.monotonic)


Dial = Callable[[Flow], Awaitable[socket.socket]]
"""Connects to where a flow goes, by the host's proxy if there is one; the socket does not block.

Raises OSError. The caller closes the socket.
"""


class Interceptor(Protocol):
    """Terminates the connections of some flows: credentials, metering, recording."""

    def wants(self, flow: Flow) -> bool:
        """Whether `intercept` shall have an allowed TLS or HTTP flow; asked after the decision."""
        ...

    async def intercept(self, client: socket.socket, first: bytes, flow: Flow, dial: Dial) -> None:
        """Serve the connection to its end.

        Args:
            client: The box's end; it does not block. The caller closes it.
            first: Bytes that have been read of it.
            flow: What is known; `sent` and `received` are to be kept up to date.
            dial: Connects to the flow's destination.
        """
        ...
