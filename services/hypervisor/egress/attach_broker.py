"""What a gateway is told about interception, and the broker beside it, as the hypervisor starts them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.hypervisor.egress import child
from services.hypervisor.egress.broker_config import BrokerConfig
from services.hypervisor.egress.credential import Interceptions
from services.hypervisor.pidfd import Process

# It ends with its machine by itself; a program that it runs for a credential may take a moment.
END_SECONDS = 10.0
_MODULE = "services.hypervisor.egress.broker_process"


class BoxBroker:
    """The process that gives a box's gateway credentials. It outlives the service, as the gateway does."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def pids(self) -> tuple[int, ...]:
        """The process, while it is there."""
        return (self._process.pid,) if self._process.alive else ()

    async def end(self) -> None:
        """Have it end, its machine being gone; returns when it is gone. Idempotent."""
        if not await self._process.wait(END_SECONDS):
            self._process.kill_group()
            await self._process.wait(END_SECONDS)
        self.close()

    def close(self) -> None:
        """End the watch. Idempotent."""
        self._process.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Intercepted:
    """What a box's gateway and broker are to be told.

    Attributes:
        told: `GatewayConfig.interception`; empty if nothing is intercepted.
        certificate: What the guest is to trust, PEM.
        fds: What the gateway inherits.
        broker: For the broker; None if the box has no credentials.
    """

    told: Mapping[str, Any] = field(default_factory=dict, repr=False)
    certificate: bytes = b""
    fds: tuple[int, ...] = ()
    broker: BrokerConfig | None = None

    async def start_broker(self, log: int) -> BoxBroker | None:
        """Start the broker, if there is to be one; `log` is where it complains."""
        if self.broker is None:
            return None
        data = self.broker.to_json()
        fds = (self.broker.machine_fd, self.broker.socket_fd)
        read, write = os.pipe2(os.O_CLOEXEC)
        with os.fdopen(write, "wb") as pipe:
            try:
                pid = await asyncio.to_thread(child.spawn, _MODULE, read, (read, *fds), log)
            finally:
                os.close(read)
            broker = BoxBroker(Process.watch(pid))
            with contextlib.suppress(BrokenPipeError):  # it ended; the gateway's questions say so
                await asyncio.to_thread(child.write, pipe, data)
        return broker


def intercept(text: str, machine_fd: int, extra_ca: str, stack: contextlib.ExitStack) -> Intercepted:
    """Prepare what a box's record says.

    Args:
        text: As `Interceptions.to_json` wrote it.
        machine_fd: pidfd of the machine.
        extra_ca: PEM certificates that the host trusts besides its own.
        stack: Closes our ends of the descriptors, once both processes have theirs.
    """
    found = Interceptions.from_json(text)
    if not found:
        return Intercepted()
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    told, grants, certificate = found.prepare(theirs.fileno() if found.credentials else -1, extra_ca)
    broker = None
    if grants:
        broker = BrokerConfig(
            machine_fd=machine_fd, socket_fd=ours.fileno(), token=told.token, grants=grants, extra_ca=extra_ca
        )
    return Intercepted(told=told.to_json(), certificate=certificate, fds=told.fds, broker=broker)
