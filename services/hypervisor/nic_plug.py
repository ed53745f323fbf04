"""The network device of a running machine: where it is plugged in, also for a service that takes it up."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from services.hypervisor import layout, record
from services.hypervisor.egress import link
from services.hypervisor.monitor import Monitor

_NETDEV = "network"


class NicPlug:
    """Plugs it in and out; the backend, with the tap, stays while the device is out."""

    def __init__(self, directory: Path, monitor: Monitor) -> None:
        self.directory = directory
        self._monitor = monitor
        self._port: int | None = None

    @property
    def port(self) -> int | None:
        """The port it is in, or was last; None if there is none."""
        return self._port

    def read(self) -> None:
        """Read what another process has noted."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._port = int(json.loads((self.directory / layout.NIC_FILE).read_bytes())["port"])

    async def put_in(self, tap: int, port: int) -> None:
        """Give the machine a network device on the tap with descriptor `tap`, in port `port`."""
        await self._monitor.execute("getfd", {"fdname": _NETDEV}, fd=tap)
        await self._monitor.execute(
            "netdev_add", {"type": "tap", "id": _NETDEV, "fd": _NETDEV, "vhost": False}
        )
        await self._add(port)

    async def take_out(self) -> None:
        """Unplug it, if there is one; returns once the guest has let go."""
        if self._port is not None:
            await self._monitor.unplug(f"nic{self._port}dev", "let go of its network device")

    async def put_back(self) -> None:
        """Plug it in on the other port: one that has just lost its device does not always take the next."""
        if self._port is not None:
            await self._add(1 - self._port)

    async def renew(self) -> None:
        """Plug it in anew, wherever it has been left."""
        if self._port is None:
            return
        found = await self._monitor.execute("qom-list", {"path": "/machine/peripheral"})
        names = {each["name"] for each in found}
        for port in (0, 1):
            if f"nic{port}dev" in names:
                await self._monitor.unplug(f"nic{port}dev", "let go of its network device")
                self._port = port
        await self.put_back()

    async def replace(self, tap: int) -> None:
        """Take the device out and its backend away, and put another one in."""
        await self.take_out()
        await self._monitor.execute("netdev_del", {"id": _NETDEV})
        await self.put_in(tap, 1 - self._port if self._port is not None else 0)

    async def _add(self, port: int) -> None:
        self._port = port
        record.write_atomically(self.directory / layout.NIC_FILE, json.dumps({"port": port}).encode())
        await self._monitor.execute(
            "device_add",
            {
                "driver": "virtio-net-pci",
                "id": f"nic{port}dev",
                "bus": f"nic{port}",
                "netdev": _NETDEV,
                "mac": link.GUEST_MAC,
                "romfile": "",
            },
        )
