"""Keeps a box's gateway alive: it makes the namespace, starts the gateway, and starts it again if it ends.

`python -m services.hypervisor.egress.keeper --config-fd N` reads a `GatewayConfig` from descriptor N. What
holds:

- The machine is gone => gateway and keeper are gone; the namespace goes with its last socket.
- The keeper is gone => the gateway is gone (PDEATHSIG): no connection is left undecided.
- The gateway is gone, however it went => an event says so, and another one serves the same sockets.

The control socket receives one message: "tap" with the tap's descriptor, or "failed" and why. The gateway is
a fork of this process, so that what both have loaded is in memory once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from services.common.egress import plain
from services.hypervisor import confine, seccomp
from services.hypervisor.egress import gateway_seccomp, interception, namespace
from services.hypervisor.egress.audit import AuditLog, Event
from services.hypervisor.egress.gateway import Gateway
from services.hypervisor.egress.gateway_config import MAX_CONFIG_BYTES, GatewayConfig
from services.hypervisor.egress.namespace import Descriptors, NamespaceFailed
from services.hypervisor.egress.resolver import Resolver
from services.hypervisor.egress.upstream import parse_proxy

log = logging.getLogger(__name__)

_PDEATHSIG, _DUMPABLE = 1, 4
FILES = 32768
"""10,000 connections have two sockets each."""
DATA_BYTES = 1 << 30
RESTARTS_AT_ONCE = 5
"""Then one per second: a gateway that cannot live must not take the host's processors."""
_MAX_TEXT = 1 << 20


def main() -> NoReturn:
    """Run; never returns."""
    try:
        if len(sys.argv) != 3 or sys.argv[1] != "--config-fd":
            raise ValueError("usage: python -m services.hypervisor.egress.keeper --config-fd N")
        with open(int(sys.argv[2]), "rb") as file:
            config = GatewayConfig.from_json(file.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, TypeError) as error:
        os.write(2, f"gateway: {error}\n".encode())
        os._exit(64)
    control = socket.socket(fileno=config.control_fd)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        seccomp.no_new_privileges()
        found = namespace.make(config.tun)
        # Only now: a process that is not dumpable cannot map its user into a namespace.
        seccomp.prctl(_DUMPABLE, 0)
        audit = AuditLog(config.audit_fd, config.box)
        interceptor = interception.load(config.interception, audit)
        if config.uid is not None:
            confine.drop_privileges(config.uid, config.gid, ())
        socket.send_fds(control, [b"tap"], [found.tap])
    except (NamespaceFailed, OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            control.send(f"failed {error}".encode()[:4096])
        os._exit(1)
    control.close()
    os.close(found.tap)  # QEMU's now: the device goes with the machine
    logging.basicConfig(level=logging.INFO, format="gateway: %(message)s")
    _keep(config, found, audit, interceptor)


def _keep(config: GatewayConfig, found: Descriptors, audit: AuditLog, interceptor: object) -> NoReturn:
    gc.collect()
    gc.freeze()  # the collector would write to the pages that the gateway shares
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    starts: list[float] = []
    while True:
        now = time.monotonic()
        starts = [each for each in starts if now - each < 1.0] + [now]
        pid = os.fork()
        if pid == 0:
            _become_gateway(config, found, audit, interceptor)
        worker = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(worker, select.POLLIN)
        poll.register(config.machine_fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        if config.machine_fd in ready:
            signal.pidfd_send_signal(worker, signal.SIGKILL)
            os.waitpid(pid, 0)
            os._exit(0)
        os.close(worker)
        _, status = os.waitpid(pid, 0)
        how = (
            f"signal {os.WTERMSIG(status)}"
            if os.WIFSIGNALED(status)
            else f"exit code {os.WEXITSTATUS(status)}"
        )
        reason = f"the gateway has ended ({how}); all connections of the box with it. Another one is started"
        audit.record(Event(kind="gateway", allowed=False, reason=reason))
        if len(starts) >= RESTARTS_AT_ONCE:
            waiting = select.poll()
            waiting.register(config.machine_fd, select.POLLIN)
            if waiting.poll(1000):
                os._exit(0)


def _become_gateway(
    config: GatewayConfig, found: Descriptors, audit: AuditLog, interceptor: object
) -> NoReturn:
    try:
        seccomp.prctl(_PDEATHSIG, signal.SIGKILL)
        resolver = Resolver(_text(config.resolv_conf), _text(config.hosts), config.name_servers)
        gateway = Gateway(
            config.box,
            plain.from_json(config.policy),
            audit,
            resolver,
            host_address=config.host_address,
            proxy=parse_proxy(config.proxy),
            no_proxy=config.no_proxy,
            interceptor=interceptor,  # type: ignore[arg-type]
        )
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        files = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
        asyncio.run(_serve(gateway, found, audit))
    except BaseException as error:
        os.write(2, f"gateway: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)


async def _serve(gateway: Gateway, found: Descriptors, audit: AuditLog) -> None:
    tcp = [socket.socket(fileno=fd) for fd in (found.tcp, found.tcp6)]
    dns = [socket.socket(fileno=fd) for fd in (found.dns, found.dns6)]
    dns_tcp = [socket.socket(fileno=fd) for fd in (found.dns_tcp, found.dns_tcp6)]
    packets = socket.socket(fileno=found.packets)
    confine.deny_files()
    gateway_seccomp.install()
    audit.record(Event(kind="gateway", reason="the gateway serves"))
    await gateway.serve(tcp, dns, dns_tcp, packets)


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes()[:_MAX_TEXT].decode(errors="replace")
    except OSError as error:
        log.warning("%s: %s", path, error.strerror)
        return ""


if __name__ == "__main__":
    main()
