"""A box's network: its gateway is started while its guest is claimed, then its device is plugged in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

from services.common.errors import NotFound, VoidboxError
from services.hypervisor.claim import Guest
from services.hypervisor.driver import Machine, MachinePlan
from services.hypervisor.egress.attach import BoxGateway

log = logging.getLogger(__name__)


class BoxNetwork:
    """The network of one box, which may have none; `end` or `close` come last."""

    def __init__(self, box_id: str, directory: Path) -> None:
        self._box_id = box_id
        self._directory = directory
        self._starting: asyncio.Task[BoxGateway] | None = None
        self._gateway: BoxGateway | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        """Its processes on the host."""
        return self._gateway.pids if self._gateway is not None else ()

    def start(self, plan: MachinePlan, machine: Machine) -> None:
        """Begin to start the gateway of a machine that runs, if the plan has one."""
        if plan.gateway is None:
            return
        user = (plan.identity.uid, plan.identity.gid) if os.geteuid() == 0 else None
        self._starting = asyncio.create_task(
            BoxGateway.start(
                self._box_id,
                plan.config.egress,
                self._directory,
                machine.pids[0],
                plan.gateway,
                user,
                plan.config.interceptions,
            )
        )

    async def connect(self, plan: MachinePlan, machine: Machine, guest: Guest) -> bool:
        """Plug the device in and have the guest set it up; whether there is one.

        Raises:
            WrongState: the host allows no gateway.
            VoidboxError: the guest cannot have the device.
        """
        if self._starting is None:
            return False
        self._gateway = await self._starting
        self._starting = None
        with self._gateway.tap() as tap:
            await machine.plug_nic(tap, plan.nic_port)
        await guest.configure_network(self._gateway.certificate)
        return True

    def adopt(self) -> None:
        """Take up the gateway that another process has started."""
        try:
            self._gateway = BoxGateway.adopt(self._directory)
        except NotFound as error:
            log.warning("box %s has no network any more: %s", self._box_id, error.message)

    async def end(self) -> None:
        """Have the gateway end, its machine being gone. Idempotent."""
        await self._forsake()
        if self._gateway is not None:
            gateway, self._gateway = self._gateway, None
            await gateway.end()

    async def close(self) -> None:
        """Let go of a gateway that goes on with its machine. Idempotent."""
        await self._forsake()
        if self._gateway is not None:
            gateway, self._gateway = self._gateway, None
            gateway.close()

    async def _forsake(self) -> None:
        if self._starting is not None:
            task, self._starting = self._starting, None
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, VoidboxError, OSError):
                self._gateway = await task
