"""The ladder that ends a machine: ask QEMU, then its shim, then kill both."""

from __future__ import annotations

import asyncio
import contextlib
import signal

from services.common.errors import Unavailable, VoidboxError
from services.hypervisor.pidfd import Process
from services.hypervisor.qmp import QmpClient

# The rungs; each is reached only if the one before failed.
QUIT_SECONDS = 3.0
TERM_SECONDS = 4.0
KILL_SECONDS = 5.0


async def end(
    shim: Process, client: QmpClient | None, ended: asyncio.Event, pids: tuple[int, ...], *, gently: bool
) -> None:
    """End a machine; returns when its processes are gone. Idempotent.

    Args:
        shim: Its leading process.
        client: QEMU's monitor, if there is one.
        ended: Is set once all its processes are gone.
        pids: Those, for the message.
        gently: Start with QMP quit, upon which QEMU flushes its disks, and SIGTERM.

    Raises:
        Unavailable: the processes do not end although they were killed.
    """
    if gently and client is not None:
        with contextlib.suppress(VoidboxError):
            await client.execute("quit", seconds=QUIT_SECONDS)
        await _within(QUIT_SECONDS, ended)
    if gently and not ended.is_set():
        shim.send(signal.SIGTERM)
        await _within(TERM_SECONDS, ended)
    if not ended.is_set():
        shim.kill_group()
        await _within(KILL_SECONDS, ended)
    if not ended.is_set():
        raise Unavailable(
            f"processes {pids} do not end although they were killed; look at their state in ps",
            reason="PROCESS_STUCK",
        )


async def _within(seconds: float, ended: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await ended.wait()
