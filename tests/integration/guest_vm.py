"""A real machine that runs the real guest image, reached as the hypervisor reaches it."""

from __future__ import annotations

import os
from pathlib import Path

from grpc import aio

from services.common.paths import Paths
from services.imager.guest_store import load_guest_image
from tests.integration import vsock_machine

SECRET = bytes(range(32))
METADATA = (("voidbox-secret-bin", SECRET),)


class GuestMachine(vsock_machine.Machine):
    """`vsock_machine.Machine` with the image's own `/init` and more devices."""

    def __init__(
        self,
        *,
        memory_mib: int = 256,
        vcpus: int = 1,
        devices: tuple[str, ...] = (),
        append: str = "",
        uid: int | None = None,
    ) -> None:
        super().__init__(share=False, append=f"rootfstype=ramfs {append}", uid=uid)
        self._memory = memory_mib
        self._vcpus = vcpus
        self._devices = devices

    def __enter__(self) -> GuestMachine:
        super().__enter__()
        return self

    def _argv(self, kernel: str, initramfs: Path) -> list[str]:
        image = load_guest_image(Paths.from_env(os.environ).cache)
        initramfs.write_bytes(image.initramfs.read_bytes())  # without the other /init laid over it
        argv = [word.replace("320M", f"{self._memory}M") for word in super()._argv(kernel, initramfs)]
        argv[argv.index("-smp") + 1] = str(self._vcpus)
        return [*argv, *self._devices]

    def channel(self) -> aio.Channel:
        """A channel to the guest's agent."""
        return aio.insecure_channel(
            f"unix:{self.guest_socket}",
            options=(("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)),
        )
