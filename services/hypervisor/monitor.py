"""What is asked of a QEMU that runs: plug, unplug, save and load devices.

On top of QMP (`services.hypervisor.qmp`): these are the commands that have an event as their end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from services.common.errors import TimedOut, Unavailable
from services.hypervisor import argv, qmp
from services.hypervisor.argv import DiskDevice, ShareDevice, VsockDevice
from services.hypervisor.model import Transport

# Loading takes some 10 ms. A guest under emulation lets go of a device within 0.1 s, on a busy host later.
LOAD_SECONDS = 30.0
UNPLUG_SECONDS = 30.0
SAVE_SECONDS = 30.0
# Between two looks at whether a device has gone.
_LOOK_SECONDS = 0.005

Condition = Callable[[qmp.Event], bool]


class Monitor:
    """The commands of one machine over one QMP session."""

    def __init__(self) -> None:
        self.client: qmp.QmpClient | None = None
        self._waiting: list[tuple[Condition, asyncio.Future[qmp.Event]]] = []

    def on_event(self, event: qmp.Event) -> None:
        """Take an event of the session."""
        for condition, future in self._waiting:
            if not future.done() and condition(event):
                future.set_result(event)

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        seconds: float = qmp.COMMAND_SECONDS,
        fd: int | None = None,
    ) -> Any:
        """Run one command: see `qmp.QmpClient.execute`.

        Raises:
            Unavailable: the session has ended.
        """
        if self.client is None:
            raise Unavailable("QEMU's monitor is closed", reason="QMP_CLOSED")
        return await self.client.execute(name, arguments, seconds=seconds, fd=fd)

    @contextmanager
    def _expect(self, condition: Condition) -> Iterator[asyncio.Future[qmp.Event]]:
        future: asyncio.Future[qmp.Event] = asyncio.get_running_loop().create_future()
        entry = (condition, future)
        self._waiting.append(entry)
        try:
            yield future
        finally:
            self._waiting.remove(entry)
            future.cancel()

    async def _event(self, future: asyncio.Future[qmp.Event], what: str, seconds: float) -> qmp.Event:
        assert self.client is not None
        closed = asyncio.create_task(self.client.closed.wait())
        try:
            await asyncio.wait((future, closed), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()
        if future.done():
            return future.result()
        if self.client.closed.is_set():
            raise Unavailable(f"QEMU ended while it was to {what}", reason="QMP_CLOSED")
        raise TimedOut(f"QEMU did not {what} within {seconds:g} s", reason="QMP_TIMEOUT")

    async def load(self, number: int) -> None:
        """Load the device state that QEMU reads from its descriptor `number`; it stays stopped.

        Raises:
            Unavailable: the state is not of such a machine; QEMU has ended.
        """
        await self.execute(
            "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
        )
        with self._expect(_migrated) as loaded:
            await self.execute("migrate-incoming", {"uri": f"fd:{number}"})
            event = await self._event(loaded, "load the saved state", LOAD_SECONDS)
        if event.data["status"] != "completed":
            raise Unavailable("QEMU could not load the saved state", reason="RESTORE_FAILED")

    async def save(self, fd: int) -> None:
        """Write the state of all devices to the file open for writing at `fd`."""
        path = await self._lend(fd)
        try:
            await self.execute(
                "xen-save-devices-state", {"filename": path, "live": False}, seconds=SAVE_SECONDS
            )
        finally:
            await self.execute("remove-fd", {"fdset-id": int(path.rpartition("/")[2])})

    async def _lend(self, fd: int) -> str:
        """Give QEMU a copy of `fd`; returns the path by which it opens it."""
        added = await self.execute("add-fd", fd=fd)
        return f"/dev/fdset/{added['fdset-id']}"

    async def plug_vsock(self, device: VsockDevice, port: int) -> None:
        """Plug the vsock device into root port `port`."""
        name = f"vsock{port}"
        common = {"id": name, "bus": f"port{port}"}
        if device.transport is Transport.VHOST:
            kernels = {"driver": "vhost-vsock-pci", "guest-cid": device.cid, "vhostfd": str(device.fd)}
            await self.execute("device_add", {**common, **kernels})
            return
        address = {"type": "unix", "data": {"path": f"/dev/fd/{device.fd}/{argv.VHOST_SOCKET}"}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await self.execute("chardev-add", {"id": name, "backend": backend})
        await self.execute("device_add", {**common, "driver": "vhost-user-vsock-pci", "chardev": name})

    async def unplug_vsock(self, port: int, transport: Transport) -> None:
        """Take the vsock device out of its port; returns once the guest has let go of it."""
        name = f"vsock{port}"
        await self.unplug(name, "let go of its vsock device")
        if transport is Transport.VHOST_USER:
            await self.execute("chardev-remove", {"id": name})

    async def unplug(self, name: str, what: str) -> None:
        """Take the device `name` out; returns once the guest has let go of it."""
        with self._expect(_deleted(name)) as deleted:
            try:
                await self.execute("device_del", {"id": name})
            except qmp.QmpError as error:
                # Somebody else has asked for that before, and its end was not waited for.
                if "unplug" not in error.description:
                    raise
            await self._event(deleted, what, UNPLUG_SECONDS)

    async def detach_vsock(self, port: int) -> None:
        """Take the vsock device out of a machine that ends soon; returns once neither guest nor QEMU has it.

        QEMU frees a device, and says so, up to 50 ms after it has taken it out: its thread for that waits
        for more to do (util/rcu.c, call_rcu_thread). No event tells of the taking out; so it is asked for.

        Raises:
            TimedOut: the guest does not let go.
        """
        name = f"vsock{port}"
        began = time.monotonic()
        with self._expect(_deleted(name)) as deleted:
            await self.execute("device_del", {"id": name})
            while not deleted.done() and port in await self.vsock_ports():
                if time.monotonic() - began > UNPLUG_SECONDS:
                    raise TimedOut(
                        f"QEMU did not let go of its vsock device within {UNPLUG_SECONDS:g} s",
                        reason="QMP_TIMEOUT",
                    )
                await asyncio.wait((deleted,), timeout=_LOOK_SECONDS)

    async def vsock_ports(self) -> list[int]:
        """The root ports that have a vsock device."""
        found = await self.execute("qom-list", {"path": "/machine/peripheral"})
        names = [each["name"] for each in found]
        return [int(name.removeprefix("vsock")) for name in names if name.startswith("vsock")]

    async def forget_backends(self) -> None:
        """Remove what vsock devices that are gone have left."""
        for each in await self.execute("query-chardev"):
            if each["label"].startswith("vsock"):
                await self.execute("chardev-remove", {"id": each["label"]})

    async def plug(self, disks: Sequence[DiskDevice], shares: Sequence[ShareDevice], first: int = 0) -> None:
        """Plug disks and shares in; the guest is told of all devices of a port at once.

        Args:
            disks: The disks; QEMU is given their descriptors.
            shares: The shares, whose backends are on the command line.
            first: How many devices the machine has been restored with.
        """
        devices = []
        for number, disk in enumerate(disks):
            paths = {fd: await self._lend(fd) for fd in (disk.base_fd, disk.overlay_fd) if fd is not None}
            for node in argv.disk_nodes(number, disk, paths.__getitem__):
                await self.execute("blockdev-add", node)
            devices.append(argv.disk_device(number, disk))
        devices += [argv.share_device(number, share) for number, share in enumerate(shares)]
        placed = [{**device, **argv.place(first + number)} for number, device in enumerate(devices)]
        # Function 0 of a port comes last: it is what makes the guest look at all of them.
        for device in sorted(placed, key=lambda each: (str(each["bus"]), str(each["addr"])), reverse=True):
            await self.execute("device_add", device)


def _deleted(name: str) -> Condition:
    return lambda event: event.name == "DEVICE_DELETED" and event.data.get("device") == name


def _migrated(event: qmp.Event) -> bool:
    return event.name == "MIGRATION" and event.data.get("status") in ("completed", "failed")
