"""The gateway of one box as the hypervisor sees it: started, found again, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from services.common.errors import NotFound, WrongState
from services.hypervisor import layout, record
from services.hypervisor.egress import child
from services.hypervisor.egress.attach_broker import BoxBroker, intercept
from services.hypervisor.egress.gateway_config import GatewayConfig
from services.hypervisor.egress.settings import GatewaySettings
from services.hypervisor.pidfd import Process, children

# An interpreter with its modules: 0.4 s on an idle host; a loaded one may need long.
START_SECONDS = 60.0
# The keeper ends with the machine by itself; it has nothing to finish.
END_SECONDS = 10.0
_MODULE = "services.hypervisor.egress.keeper"


class BoxGateway:
    """The process that keeps a box's gateway. `close` ends the watch, not the process."""

    def __init__(self, process: Process, tap: int = -1) -> None:
        self._process = process
        self._tap = tap
        self._broker: BoxBroker | None = None
        self.certificate = b""

    @classmethod
    async def start(
        cls,
        box: str,
        policy: str,
        directory: Path,
        machine_pid: int,
        settings: GatewaySettings,
        user: tuple[int, int] | None,
        interceptions: str = "",
    ) -> BoxGateway:
        """Start a gateway.

        Args:
            box: The box's id.
            policy: As `services.common.egress.plain` writes it.
            directory: The box's.
            machine_pid: The machine's leading process; the gateway ends with it.
            settings: The host's.
            user: uid and gid to run as, None for our own.
            interceptions: As `services.hypervisor.egress.credential` writes them.

        Raises:
            WrongState: this host does not allow it; the message says what to do.
        """
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(ours)
            stack.enter_context(theirs)
            ours.setblocking(False)
            machine = os.pidfd_open(machine_pid)
            stack.callback(os.close, machine)
            audit = _append(directory / layout.EGRESS_FILE)
            stack.callback(os.close, audit)
            log = _append(directory / layout.GATEWAY_LOG_FILE)
            stack.callback(os.close, log)
            intercepted = intercept(interceptions, machine, settings.extra_ca, stack)
            config_read, config_write = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, config_read)
            pipe = stack.enter_context(os.fdopen(config_write, "wb"))
            config = GatewayConfig(
                box=box,
                policy=policy,
                uid=user[0] if user else None,
                gid=user[1] if user else None,
                machine_fd=machine,
                control_fd=theirs.fileno(),
                audit_fd=audit,
                tun=settings.tun,
                resolv_conf=settings.resolv_conf,
                hosts=settings.hosts,
                name_servers=settings.name_servers,
                proxy=settings.proxy,
                no_proxy=settings.no_proxy,
                interception=intercepted.told,
            )
            fds = (config_read, machine, theirs.fileno(), audit, *intercepted.fds)
            pid = await asyncio.to_thread(child.spawn, _MODULE, config_read, fds, log)
            process = Process.watch(pid)
            gateway = cls(process)
            gateway.certificate = intercepted.certificate
            try:
                gateway._broker = await intercepted.start_broker(log)
                gateway._note(directory)
                theirs.close()
                with contextlib.suppress(BrokenPipeError):
                    await asyncio.to_thread(child.write, pipe, config.to_json())
                gateway._tap = await _receive_tap(ours, box)
            except BaseException:
                process.kill_group()
                await process.wait(END_SECONDS)
                process.close()
                if gateway._broker is not None:
                    await gateway._broker.end()
                raise
        return gateway

    @contextlib.contextmanager
    def tap(self) -> Iterator[int]:
        """The descriptor of the tap of a gateway just started; it is closed after the block."""
        try:
            yield self._tap
        finally:
            self._close_tap()

    def _close_tap(self) -> None:
        if self._tap >= 0:
            os.close(self._tap)
            self._tap = -1

    @classmethod
    def adopt(cls, directory: Path) -> BoxGateway:
        """The gateway that another process has started.

        Raises:
            NotFound: it is gone.
        """
        try:
            found = json.loads((directory / layout.GATEWAY_FILE).read_bytes())
            return cls(Process.watch(int(found["pid"]), int(found["start"])))
        except (OSError, ValueError, KeyError) as error:
            raise NotFound(f"no gateway is noted: {error}", reason="PROCESS_GONE") from error

    def _note(self, directory: Path) -> None:
        text = json.dumps({"pid": self._process.pid, "start": self._process.started})
        record.write_atomically(directory / layout.GATEWAY_FILE, text.encode())

    @property
    def pids(self) -> tuple[int, ...]:
        """The keeper, the gateway that it has now, and the broker."""
        broker = self._broker.pids if self._broker is not None else ()
        return (self._process.pid, *children(self._process.pid), *broker) if self._process.alive else broker

    async def end(self) -> None:
        """Have it end, its machine being gone; returns when it is gone. Idempotent."""
        if not await self._process.wait(END_SECONDS):
            self._process.kill_group()
            await self._process.wait(END_SECONDS)
        if self._broker is not None:
            await self._broker.end()
        self.close()

    def close(self) -> None:
        """End the watch. Idempotent."""
        self._close_tap()
        self._process.close()
        if self._broker is not None:
            self._broker.close()


async def _receive_tap(ours: socket.socket, box: str) -> int:
    try:
        async with asyncio.timeout(START_SECONDS):
            await _readable(ours)
            data, fds, _, _ = socket.recv_fds(ours, 8192, 1)
    except TimeoutError as error:
        raise WrongState(
            f"box {box}: its gateway did not start within {START_SECONDS:g} s", reason="NO_GATEWAY"
        ) from error
    if data != b"tap" or len(fds) != 1:
        why = data.decode(errors="replace").removeprefix("failed ") or "it ended; see its gateway.log"
        raise WrongState(f"box {box} cannot have a network: {why}", reason="NO_NETWORK_NAMESPACE", box=box)
    os.set_inheritable(fds[0], False)
    return fds[0]


async def _readable(one: socket.socket) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()
    loop.add_reader(one, lambda: None if future.done() else future.set_result(None))
    try:
        await future
    finally:
        loop.remove_reader(one)


def _append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
