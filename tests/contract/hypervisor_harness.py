"""The hypervisor's real server on fake machines, and a client of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from services.common.channel import open_channel
from services.common.paths import Paths
from services.hypervisor.__main__ import running
from services.hypervisor.config import Config
from tests.contract.hypervisor_fakes import FakeDriver
from tests.vm import Client
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb


class Harness(Client):
    """The service with fake machines, and a client of it."""

    def __init__(self, channel: Any, driver: FakeDriver, directory: Path) -> None:
        super().__init__(channel)
        self.driver = driver
        self.directory = directory
        self.kernel = directory / "vmlinux"
        self.kernel.write_bytes(b"\x7fELF\x02\x01".ljust(18, b"\0") + b"\x3e\0".ljust(2000, b"\0"))
        self.initramfs = directory / "initramfs.cpio"
        self.initramfs.write_bytes(b"070701" + bytes(2000))

    def config(self, **changes: Any) -> pb.BoxConfig:
        values: dict[str, Any] = {
            "kernel_path": str(self.kernel),
            "initramfs_path": str(self.initramfs),
            "resources": {"memory_mib": 64},
        }
        return pb.BoxConfig(**(values | changes))

    async def create(self, box_id: str, **changes: Any) -> pb.Box:
        request = pb.CreateBoxRequest(box_id=box_id, config=self.config(**changes))
        return (await self.hypervisor.CreateBox(request, timeout=20)).box


@contextlib.asynccontextmanager
async def harness(directory: Path) -> AsyncIterator[Harness]:
    """The service in `directory`, for the length of the block."""
    driver = FakeDriver()
    paths = Paths(state=directory / "state", cache=directory / "cache", runtime=directory / "rt")
    async with contextlib.AsyncExitStack() as stack:
        addresses = await stack.enter_async_context(running(Config(ready_size=0), paths, driver=driver))
        channel = await stack.enter_async_context(open_channel(addresses[0]))
        yield Harness(channel, driver, directory)
        for machine in driver.machines.values():
            await machine.close()
