"""`voidbox port-forward`: ports of a box on this host's loopback, for as long as the command runs."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from services.common.errors import InvalidInput, VoidboxError
from voidbox.cli.boxes import find_box
from voidbox.cli.connection import Context
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.interrupts import Interrupted, Interrupts
from voidbox.client import Client, rpc_errors
from voidbox.hypervisor.v1 import hypervisor_pb2 as hv

_CHUNK = 64 * 1024
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """A port of this host and the guest's port behind it; host port 0 means any free one."""

    address: str
    host_port: int
    guest_port: int


def parse_forward(text: str) -> Forward:
    """Read `[ADDRESS:]HOST:GUEST`, or `PORT` for the same on both sides.

    Raises:
        InvalidInput: it is none of these.
    """
    head, _, guest = text.rpartition(":")
    if not head:
        head = guest
    address, _, host = head.rpartition(":")
    address = address.removeprefix("[").removesuffix("]") or _LOOPBACK
    ports = [int(word) if word.isascii() and word.isdecimal() else -1 for word in (host, guest)]
    try:
        ipaddress.ip_address(address)
    except ValueError:
        ports = [-1]
    if not all(0 <= port <= 65535 for port in ports) or ports[-1] == 0:
        raise InvalidInput(
            f"{text!r} is not [ADDRESS:]HOST:GUEST with an IP address and ports of 1 to 65535 "
            "(HOST 0 takes a free port); for example 8080:80",
            reason="BAD_PORT",
        )
    return Forward(address=address, host_port=ports[0], guest_port=ports[1])


def port_forward_command(context: Context) -> int:
    """Listen, and carry each connection into the box."""
    forwards = [parse_forward(text) for text in context.args.ports]
    stack = context.stack()

    async def run() -> int:
        with Interrupts() as interrupts:
            try:
                async with stack.connect() as client:
                    await interrupts.guard(_forward(context, client, forwards))
            except Interrupted:
                return interrupts.exit_code
        return ExitCode.OK

    return asyncio.run(run())


async def _forward(context: Context, client: Client, forwards: list[Forward]) -> None:
    box = await find_box(client, context.args.box)
    async with contextlib.AsyncExitStack() as stack:
        for forward in forwards:
            bridge = _Bridge(client, box, forward, context.screen.note)
            try:
                server = await asyncio.start_server(bridge.serve, forward.address, forward.host_port)
            except OSError as error:
                raise InvalidInput(
                    f"cannot listen on {forward.address} port {forward.host_port}: {error.strerror}; "
                    f"choose another, or 0 for a free one: 0:{forward.guest_port}",
                    reason="PORT_IN_USE",
                ) from error
            await stack.enter_async_context(server)
            host, port = server.sockets[0].getsockname()[:2]
            context.screen.result(
                f"{host}:{port} -> {box}:{forward.guest_port}",
                {"box_id": box, "address": host, "port": port, "guest_port": forward.guest_port},
            )
        await _until_it_ends(client, box)


async def _until_it_ends(client: Client, box: str) -> None:
    """Wait for the box's end.

    Raises:
        VoidboxError: the stack went away.
    """
    with rpc_errors():
        async for change in client.hypervisor.WatchBoxes(hv.WatchBoxesRequest(box_id=box)):
            if change.deleted or change.box.state in (hv.BOX_STATE_STOPPED, hv.BOX_STATE_FAILED):
                return


class _Bridge:
    """One listening port: every connection becomes a tunnel of its own."""

    def __init__(self, client: Client, box: str, forward: Forward, note: Callable[[str], None]) -> None:
        self._client = client
        self._box = box
        self._port = forward.guest_port
        self._note = note

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection to its end."""
        call = self._client.hypervisor.ForwardPort(self._requests(reader))
        try:
            with rpc_errors(), contextlib.suppress(ConnectionError):
                async for answer in call:
                    writer.write(answer.data)
                    await writer.drain()
                writer.write_eof()
        except VoidboxError as error:
            self._note(f"{self._box}:{self._port}: {error.message}")
            writer.transport.abort()
        finally:
            call.cancel()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _requests(self, reader: asyncio.StreamReader) -> AsyncIterator[hv.ForwardPortRequest]:
        yield hv.ForwardPortRequest(open=hv.ForwardPortOpen(box_id=self._box, port=self._port))
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_CHUNK):
                yield hv.ForwardPortRequest(data=data)
