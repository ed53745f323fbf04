"""The floor: what bare QEMU needs to bring the same kernel to a busybox init that prints a line."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import time
from pathlib import Path

from services.hypervisor.argv import EMULATED_CPU, kernel_command_line
from services.hypervisor.model import Accelerator
from services.imager import cpio

MARK = b"floor: init runs"
# Ten times what the slowest kernel needs under emulation.
BOOT_SECONDS = 120.0

INIT = f"""#!/bin/busybox sh
/bin/busybox echo "{MARK.decode()}" > /dev/console
exec /bin/busybox poweroff -f
"""


def busybox_initramfs(guest_initramfs: Path) -> bytes:
    """An initramfs of nothing but the guest image's busybox and a two-line init."""
    return initramfs_of(guest_initramfs, INIT)


def initramfs_of(guest_initramfs: Path, init: str) -> bytes:
    """An initramfs of nothing but the guest image's busybox and this init."""
    entries = {entry.name: entry for entry in cpio.read_archive(guest_initramfs.read_bytes())}
    busybox = entries["bin/busybox"]
    assert isinstance(busybox.content, bytes)
    out = io.BytesIO()
    cpio.write_archive(
        [
            cpio.file("bin/busybox", busybox.content, 0o755),
            cpio.file("init", init.encode(), 0o755),
            cpio.character_device("dev/console", 5, 1, 0o600),
        ],
        out,
    )
    return out.getvalue()


async def boot(kernel: Path, initramfs: Path, memory_mib: int, directory: Path) -> float:
    """Seconds from the start of QEMU until init has printed its line."""
    console_read, console_write = await asyncio.to_thread(_pipe)
    started = time.monotonic()
    qemu = await asyncio.create_subprocess_exec(
        "qemu-system-x86_64",
        *("-machine", "q35,accel=tcg", "-cpu", EMULATED_CPU, "-smp", "1", "-m", f"{memory_mib}M"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"),
        *(
            "-kernel",
            str(kernel),
            "-initrd",
            str(initramfs),
            "-append",
            kernel_command_line(Accelerator.TCG, 1),
        ),
        *("-serial", "stdio"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=console_write,
        cwd=directory,
    )
    console_write.close()
    seen = b""
    try:
        async with asyncio.timeout(BOOT_SECONDS):
            while MARK not in seen:
                piece = await asyncio.to_thread(console_read.read1, 4096)
                if not piece:
                    raise RuntimeError(f"{kernel} did not reach init: {seen[-500:]!r}")
                seen += piece
        return time.monotonic() - started
    finally:
        with contextlib.suppress(ProcessLookupError):
            qemu.kill()
        await qemu.wait()
        console_read.close()


def _pipe() -> tuple[io.BufferedReader, io.BufferedWriter]:
    read, write = os.pipe()
    return os.fdopen(read, "rb"), os.fdopen(write, "wb")
