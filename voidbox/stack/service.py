"""One supervised service process: started, watched, restarted within bounds, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from services.common.supervision import FD_VARIABLE
from voidbox.stack.identity import Identity
from voidbox.stack.layout import Layout
from voidbox.stack.logfile import LogFile, tail

log = logging.getLogger(__name__)

# A service that dies before it ever served is most likely misconfigured: one more try, then the reason.
MAX_FIRST_STARTS = 2
# Deaths of a service that had served, within the window, before it is given up.
MAX_DEATHS = 5
DEATH_WINDOW_SECONDS = 60.0
FIRST_DELAY_SECONDS = 0.2
MAX_DELAY_SECONDS = 10.0
# From the start of the process to its first answer: imports on a busy two-core host, plus recovery.
READY_SECONDS = 60.0
# Longer than a server's own grace (2 s) and the end of its children.
TERM_SECONDS = 20.0
KILL_SECONDS = 5.0
# Output that a dead service's own children may still hold open is not waited for longer.
DRAIN_SECONDS = 1.0


class ServiceState(enum.StrEnum):
    """STARTING → RUNNING → BACKOFF → STARTING …; FAILED when given up; STOPPED when asked to."""

    STARTING = "starting"
    RUNNING = "running"
    BACKOFF = "backoff"
    FAILED = "failed"
    STOPPED = "stopped"


class Service:
    """Keeps one service running until `stop`.

    Args:
        name: The service, e.g. "imager".
        layout: Tells its command line, socket and log file.
        env: Its environment.
        changed: Called after each change of state or process.
    """

    def __init__(
        self, name: str, layout: Layout, env: Mapping[str, str], changed: Callable[[], None]
    ) -> None:
        self.name = name
        self.state = ServiceState.STARTING
        self.identity: Identity | None = None
        self.restarts = 0
        self.detail = ""
        self._layout = layout
        self._env = dict(env)
        self._changed = changed
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._was_ready = False

    def start(self) -> None:
        """Begin to keep it running; also revives one that was given up."""
        if self._task is None or self._task.done():
            self._was_ready = False
            self._set(ServiceState.STARTING)
            self._task = asyncio.create_task(self._keep(), name=f"keep {self.name}")

    async def stop(self, *, force: bool = False) -> None:
        """TERM (unless `force`), then KILL; afterwards the process is gone."""
        self._stop.set()
        process = self._process
        if process is not None and process.returncode is None:
            waits = [(signal.SIGKILL, KILL_SECONDS)]
            if not force:
                waits.insert(0, (signal.SIGTERM, TERM_SECONDS))
            for number, seconds in waits:
                with contextlib.suppress(ProcessLookupError):
                    if number is signal.SIGKILL:
                        log.warning("%s is killed", self.name)
                        # Its own children too; boxes have sessions of their own.
                        os.killpg(process.pid, number)
                    process.send_signal(number)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await process.wait()
                    break
        if self._task is not None:
            await self._task

    def describe(self) -> dict[str, Any]:
        """What a client is told about it."""
        return {
            "name": self.name,
            "state": str(self.state),
            "pid": self.identity.pid if self.identity else 0,
            "restarts": self.restarts,
            "address": f"unix:{self._layout.socket(self.name)}",
            "detail": self.detail,
            "log": str(self._layout.log(self.name)),
            "log_tail": tail(self._layout.log(self.name)) if self.state is ServiceState.FAILED else [],
        }

    async def _keep(self) -> None:
        deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        starts = 0
        delay = FIRST_DELAY_SECONDS
        while not self._stop.is_set():
            self._set(ServiceState.STARTING, self.detail)
            starts += 1
            try:
                how = await self._live()
            except OSError as error:
                how = f"cannot be started: {error}"
            self.identity = None
            if self._stop.is_set():
                break
            now = time.monotonic()
            deaths.append(now)
            log.warning("%s %s", self.name, how)
            given_up = (
                len(deaths) == MAX_DEATHS and now - deaths[0] < DEATH_WINDOW_SECONDS
                if self._was_ready
                else starts >= MAX_FIRST_STARTS
            )
            if given_up:
                self._set(ServiceState.FAILED, how)
                log.error("%s is given up", self.name)
                return
            recent = sum(now - death < DEATH_WINDOW_SECONDS for death in deaths)
            delay = min(MAX_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (recent - 1))
            self.restarts += 1
            self._set(ServiceState.BACKOFF, f"{how}; restarted in {delay:g} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stop.wait()
        self._set(ServiceState.STOPPED)

    async def _live(self) -> str:
        """One life of the process; returns how it ended."""
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            with theirs:
                process = self._process = await asyncio.create_subprocess_exec(
                    *self._layout.argv(self.name),
                    cwd="/",
                    env={**self._env, FD_VARIABLE: str(theirs.fileno())},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            self.identity = Identity.of(process.pid)
            self._changed()
            assert process.stdout is not None
            pump = asyncio.create_task(self._pump(process.stdout), name=f"log {self.name}")
            ended = asyncio.create_task(process.wait(), name=f"wait {self.name}")
            try:
                late = await self._until_ready(ours, ended)
                code = await ended
            finally:
                ended.cancel()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_SECONDS):
                        await asyncio.shield(pump)
                pump.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await pump
        if late:
            return f"did not answer within {READY_SECONDS:g} s"
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"

    async def _until_ready(self, ours: socket.socket, ended: asyncio.Task[int]) -> bool:
        """Wait until it serves or has ended; returns whether it was killed for taking too long."""
        ready = asyncio.create_task(asyncio.get_running_loop().sock_recv(ours, 64))
        done, _ = await asyncio.wait(
            (ready, ended), timeout=READY_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if ready in done and ready.exception() is None and ready.result():
            self._was_ready = True
            self._set(ServiceState.RUNNING)
            log.info("%s serves", self.name)
            return False
        ready.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await ready
        if done or self._process is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return True

    async def _pump(self, stream: asyncio.StreamReader) -> None:
        file = LogFile(self._layout.log(self.name))
        try:
            while data := await stream.read(64 * 1024):
                with contextlib.suppress(OSError):  # a full disk must not stop the service
                    file.write(data)
        finally:
            file.close()

    def _set(self, state: ServiceState, detail: str = "") -> None:
        self.state = state
        self.detail = detail
        self._changed()
