"""Where a machine's vsock device is plugged in, for whoever has to take it out again."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import WrongState
from services.hypervisor import layout, record
from services.hypervisor.argv import VsockDevice
from services.hypervisor.model import Transport
from services.hypervisor.monitor import Monitor


@dataclass(frozen=True, slots=True)
class Plugged:
    """A device and the root port that it is in, or was last."""

    device: VsockDevice
    port: int


class VsockPlug:
    """The vsock device of one machine; a service that takes the machine up reads where it is."""

    def __init__(self, directory: Path, monitor: Monitor) -> None:
        self.directory = directory
        self._monitor = monitor
        self._plugged: Plugged | None = None

    def known(self) -> Plugged:
        """Where it is.

        Raises:
            WrongState: an earlier version started the machine, and it is not known.
        """
        if self._plugged is None:
            raise WrongState("it is not known how its vsock device is plugged in", reason="NOT_RESTORED")
        return self._plugged

    def note(self, device: VsockDevice, port: int) -> None:
        """Remember it, also on disk."""
        self._plugged = Plugged(device, port)
        text = json.dumps(
            {"transport": device.transport.value, "cid": device.cid, "fd": device.fd, "port": port}
        )
        record.write_atomically(self.directory / layout.DEVICE_FILE, text.encode())

    def read(self) -> None:
        """Read what another process has noted."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads((self.directory / layout.DEVICE_FILE).read_bytes())
            device = VsockDevice(
                transport=Transport(found["transport"]), cid=int(found["cid"]), fd=int(found["fd"])
            )
            self._plugged = Plugged(device, int(found["port"]))

    async def put_in(self, device: VsockDevice, port: int) -> None:
        """Plug it in."""
        self.note(device, port)
        await self._monitor.plug_vsock(device, port)

    async def take_out(self) -> None:
        """Unplug it; returns once the guest has let go."""
        plugged = self.known()
        await self._monitor.unplug_vsock(plugged.port, plugged.device.transport)

    async def put_back(self) -> None:
        """Plug it in on the other port: one that has just lost its device does not always take the next."""
        plugged = self.known()
        await self.put_in(plugged.device, 1 - plugged.port)

    async def renew(self) -> None:
        """Plug it in anew, wherever it has been left."""
        plugged = self.known()
        for port in await self._monitor.vsock_ports():
            await self._monitor.unplug_vsock(port, plugged.device.transport)
            self._plugged = plugged = Plugged(plugged.device, port)
        await self._monitor.forget_backends()
        await self.put_back()
