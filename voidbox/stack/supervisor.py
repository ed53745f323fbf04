"""The background process that owns the three services.

Clients talk to it over `stack.sock`: one JSON object per line. A request is `{"op": …}`:

- `wait`: answers once all services serve, or one cannot be started; revives given-up ones.
- `status`: answers at once.
- `down` (with `force`): answers with progress lines and then, when all is gone, the result.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

import voidbox
from services.common.errors import VoidboxError
from voidbox.stack.identity import Identity
from voidbox.stack.layout import SERVICES, Layout
from voidbox.stack.service import Service, ServiceState
from voidbox.stack.sweep import sweep, write_record

log = logging.getLogger(__name__)

# For runs to end their programs and boxes, all at once.
CANCEL_SECONDS = 45.0
REQUEST_LIMIT_BYTES = 4096


class Supervisor:
    """Runs until it is told to stop.

    Args:
        layout: The stack's files.
        env: The environment of the client that started the stack, for the services.
        listener: Bound and listening control socket.
    """

    def __init__(self, layout: Layout, env: Mapping[str, str], listener: socket.socket) -> None:
        self._layout = layout
        self._env = layout.service_env(env)
        self._listener = listener
        self._services = {name: Service(name, layout, self._env, self._changed) for name in SERVICES}
        self._change = asyncio.Condition()
        self._notifier: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._force = False
        self._stopping = False
        self._settled = False
        self._started = time.time()
        self._askers: set[asyncio.StreamWriter] = set()
        self._clients: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Supervise; returns the exit code of the process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        server = await asyncio.start_unix_server(self._client, sock=self._listener, limit=REQUEST_LIMIT_BYTES)
        log.info("voidbox %s: starting %s", voidbox.__version__, ", ".join(SERVICES))
        for service in self._services.values():
            service.start()
        first = asyncio.create_task(self._first_start())
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait((first, stop), return_when=asyncio.FIRST_COMPLETED)
        if first.done() and not first.result():
            log.error("the stack could not be started")
        else:
            await stop
        first.cancel()
        left = await self._shut_down()
        server.close()
        for writer in list(self._askers):
            await _send(writer, {"kind": "result", "left": left})
        self._listener.close()
        for task in list(self._clients):
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        stop.cancel()
        log.info("stopped%s", f"; left behind: {'; '.join(left)}" if left else "; nothing is left")
        return 1 if left else 0

    async def _first_start(self) -> bool:
        """Wait until all services have served once or one is given up; returns whether all do."""
        async with self._change:
            await self._change.wait_for(self._is_settled)
        ok = all(service.state is ServiceState.RUNNING for service in self._services.values())
        if ok:
            self._settled = True
            log.info("all services serve")
        return ok

    def _is_settled(self) -> bool:
        states = [service.state for service in self._services.values()]
        return ServiceState.FAILED in states or all(state is ServiceState.RUNNING for state in states)

    def _changed(self) -> None:
        identities = {
            service.name: service.identity.to_json()
            for service in self._services.values()
            if service.identity is not None
        }
        own = Identity.of(os.getpid())
        record = {
            "version": voidbox.__version__,
            "runtime": str(self._layout.runtime),
            "supervisor": own.to_json() if own else None,
            "services": identities,
        }
        try:
            write_record(self._layout, record)
        except OSError as error:
            log.error("cannot write %s: %s", self._layout.record, error)
        if self._notifier is None or self._notifier.done():
            self._notifier = asyncio.create_task(self._notify())

    async def _notify(self) -> None:
        async with self._change:
            self._change.notify_all()

    def _status(self) -> dict[str, Any]:
        services = [service.describe() for service in self._services.values()]
        states = {service.state for service in self._services.values()}
        state = "running" if states == {ServiceState.RUNNING} else "starting"
        if self._stopping:
            state = "stopping"
        if ServiceState.FAILED in states:
            state = "failed"
        return {
            "kind": "status",
            "state": state,
            # A stack that could not be started is about to end.
            "ending": self._stopping or (state == "failed" and not self._settled),
            "version": voidbox.__version__,
            "pid": os.getpid(),
            "start_time": self._started,
            "runtime": str(self._layout.runtime),
            "state_dir": str(self._layout.state),
            "cache_dir": str(self._layout.cache),
            "services": services,
            "choices": self._layout.choices(self._env),
        }

    def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._answer(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = _parse(await reader.readline())
            if request.get("op") == "wait":
                await self._answer_wait(writer)
            elif request.get("op") == "status":
                await _send(writer, self._status())
            elif request.get("op") == "down":
                self._askers.add(writer)
                self._force = self._force or request.get("force") is True
                self._stop.set()
                await reader.read()  # until the client goes away, or this process does
            else:
                await _send(writer, {"kind": "error", "message": "expected op wait, status or down"})
        except (ConnectionError, asyncio.LimitOverrunError, ValueError):
            pass
        finally:
            self._askers.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _answer_wait(self, writer: asyncio.StreamWriter) -> None:
        if self._settled:
            for service in self._services.values():
                if service.state is ServiceState.FAILED and not self._stopping:
                    log.info("%s gets another chance", service.name)
                    service.start()
        async with self._change:
            await self._change.wait_for(lambda: self._is_settled() or self._stopping)
        await _send(writer, self._status())

    async def _say(self, text: str) -> None:
        log.info("%s", text)
        for writer in list(self._askers):
            await _send(writer, {"kind": "progress", "text": text})

    async def _shut_down(self) -> list[str]:
        self._stopping = True
        await self._notify()
        if not self._force and self._services["orchestrator"].state is ServiceState.RUNNING:
            await self._cancel_runs()
        for name in reversed(SERVICES):
            await self._say(f"stopping {name}")
            await self._services[name].stop(force=self._force)
        await self._say("removing what is left of boxes")
        swept = await asyncio.to_thread(sweep, self._layout, self._env)
        return swept.left

    async def _cancel_runs(self) -> None:
        from voidbox.client import Client

        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                async with Client.open(self._layout.address("orchestrator")) as client:
                    runs = [run async for run in client.list_runs(active=True)]
                    if not runs:
                        return
                    await self._say(f"stopping {len(runs)} run{'s' if len(runs) > 1 else ''}")
                    for run in runs:
                        await client.cancel_run(run.id, "the stack is stopping")
                    for run in runs:
                        await client.wait_run(run.id)
        except (VoidboxError, TimeoutError) as error:
            reason = str(error) or f"took longer than {CANCEL_SECONDS:g} s"
            await self._say(f"runs could not be stopped in order: {reason}")


def _parse(line: bytes) -> dict[str, Any]:
    request = json.loads(line or b"{}")
    return request if isinstance(request, dict) else {}


async def _send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    with contextlib.suppress(ConnectionError):
        writer.write(json.dumps(message).encode() + b"\n")
        await writer.drain()
