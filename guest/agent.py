"""The guest agent: the `GuestService` of one box, in its own process beside PID 1."""

from __future__ import annotations

import os

from guest.imports import leave_out, leave_out_pure_protobuf

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # nothing here forks
leave_out()
leave_out_pure_protobuf()

import asyncio  # noqa: E402
import contextlib  # noqa: E402
import gc  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
from typing import Any  # noqa: E402

from grpc import aio  # noqa: E402

from guest import log, syscalls  # noqa: E402
from guest.control import Control  # noqa: E402
from guest.guest_state import Guest  # noqa: E402
from guest.lazy import LazyServices  # noqa: E402
from guest.relay import Relay  # noqa: E402
from guest.rpc import Gate  # noqa: E402
from guest.servicer import GuestServicer  # noqa: E402
from guest.settings import AGENT_ID, Settings  # noqa: E402
from voidbox.guest.v1 import guest_pb2_grpc  # noqa: E402

# Arguments and environment of a program travel in one message; execve takes 2 MiB at most.
_MESSAGE_LIMIT = 3 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
    ("grpc.max_send_message_length", _MESSAGE_LIMIT),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_channelz", 1),
    # A call that waits for the agent to take it is cancelled after this many seconds (30 by default):
    # too short for hundreds of calls at once on an emulated machine whose host is busy.
    ("grpc.server_max_unrequested_time_in_server", 600),
)
_STOP_GRACE = 2.0  # for answers that are on their way when the box shuts down


def main(settings: Settings, channel: socket.socket) -> None:
    """Serve until the box shuts down or PID 1 goes away."""
    if settings.guest:
        # Even a program of the same user id may not read this process's memory.
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        os.setresuid(AGENT_ID, 0, AGENT_ID)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(settings, channel))


async def _serve(settings: Settings, channel: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    lost = asyncio.Event()
    stopping = asyncio.Event()
    guest: Guest

    control = Control(channel, lambda message: guest.execs.on_exit(message), lost.set)
    guest = Guest(settings, control)
    gate = Gate()
    hello = await control.hello
    if hello["state"]:
        gate.secret = guest.restore(hello["state"])
    for exec_id, pid in hello["running"]:
        guest.execs.adopt(exec_id, pid)
    address = f"{settings.run_dir}/agent.sock"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(address)
    server = aio.server(options=_OPTIONS)
    servicer: Any = GuestServicer(gate, guest, stopping)
    guest_pb2_grpc.add_GuestServiceServicer_to_server(servicer, server)
    server.add_generic_rpc_handlers((LazyServices(gate),))
    server.add_insecure_port(f"unix:{address}")
    await server.start()
    relay = loop.create_task(Relay(await control.listener, address).run())
    gc.freeze()
    gc.enable()
    log.info(f"agent serves {settings.listen} after {_uptime():.2f} s")
    waits = [loop.create_task(lost.wait()), loop.create_task(stopping.wait()), relay]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    if stopping.is_set():
        await server.stop(_STOP_GRACE)
        control.tell({"op": "end"})
        await lost.wait()
    relay.cancel()
    await asyncio.gather(relay, return_exceptions=True)


def _uptime() -> float:
    with open("/proc/uptime") as file:
        return float(file.read().split()[0])
