"""`voidbox doctor`: what this host needs to run boxes, what it has, and the cure for each gap."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import VoidboxError
from voidbox.cli.connection import Context
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.screen import safe, size
from voidbox.cli.stack import EMULATION
from voidbox.client import Client
from voidbox.hypervisor.v1 import hypervisor_pb2 as hv
from voidbox.imager.v1 import imager_pb2

# Oldest supported; older ones lack `vhost-user-vsock` on file-backed private memory.
QEMU_VERSION = (7, 2)
PYTHON_VERSION = (3, 11)
# A guest image is some 150 MB, a box 1 GiB of memory by default.
DISK_BYTES = 2 * 1024**3
MEMORY_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at: `level` is "ok", "warning" or "failed"."""

    name: str
    level: str
    detail: str
    cure: str = ""


def doctor_command(context: Context) -> int:
    """Check the host; exits with `ExitCode.INFRASTRUCTURE` if something needed is missing."""
    checks: list[Check] = []
    if context.remote is None:
        checks += [_python(), _qemu(), _accelerator(), _memory(), *_disk(context)]
    checks += _stack(context)
    failed = any(check.level == "failed" for check in checks)
    if context.screen.json:
        keys = ("name", "level", "detail", "cure")
        context.screen.data(
            {"ok": not failed, "checks": [{key: getattr(check, key) for key in keys} for check in checks]}
        )
    else:
        print("\n".join(_line(context, check) for check in checks))
        print("\nthis host cannot run boxes yet" if failed else "\nthis host can run boxes")
    return ExitCode.INFRASTRUCTURE if failed else ExitCode.OK


def _line(context: Context, check: Check) -> str:
    mark, color = {"ok": ("ok     ", "green"), "warning": ("warning", "yellow")}.get(
        check.level, ("FAILED ", "red")
    )
    mark = context.screen.paint(mark, color) if sys.stdout.isatty() else mark
    cure = f"\n           → {check.cure}" if check.cure else ""
    return f"{mark}  {check.name}: {safe(check.detail)}{cure}"


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info >= PYTHON_VERSION:
        return Check(name="python", level="ok", detail=version)
    return Check(name="python", level="failed", detail=version, cure="install Python 3.11 or newer")


def _qemu() -> Check:
    program = (
        f"qemu-system-{ {'arm64': 'aarch64', 'amd64': 'x86_64'}.get(platform.machine(), platform.machine()) }"
    )
    package = "qemu-system-arm" if program.endswith("aarch64") else "qemu-system-x86"
    cure = f"sudo apt-get install --no-install-recommends {package}"
    path = shutil.which(program)
    if path is None:
        return Check(name="qemu", level="failed", detail=f"{program} is not installed", cure=cure)
    try:
        text = subprocess.run(
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            stdin=subprocess.DEVNULL,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name="qemu", level="failed", detail=f"{path} does not run: {error}", cure=cure)
    found = re.search(r"version (\d+)\.(\d+)[.\d]*", text)
    version = found.group().removeprefix("version ") if found else "unknown"
    if not found or (int(found[1]), int(found[2])) < QEMU_VERSION:
        return Check(
            name="qemu", level="failed", detail=f"{path} is version {version}; 7.2 is the oldest", cure=cure
        )
    return Check(name="qemu", level="ok", detail=f"{version} ({path})")


def _accelerator() -> Check:
    """Only what can be seen without a guest; the hypervisor's own probe follows."""
    device = Path("/dev/kvm")
    if not device.exists():
        return Check(
            name="kvm device",
            level="warning",
            detail=f"/dev/kvm is missing; boxes are emulated ({EMULATION}, and slower)",
            cure="use a host with hardware virtualization if you need isolation",
        )
    if not os.access(device, os.R_OK | os.W_OK):
        return Check(
            name="kvm device",
            level="warning",
            detail="/dev/kvm is there but you may not use it",
            cure="sudo usermod -aG kvm $USER, then log in again",
        )
    return Check(
        name="kvm device", level="ok", detail="/dev/kvm can be opened; whether guests run on it is probed"
    )


def _memory() -> Check:
    available = _meminfo("MemAvailable")
    if available >= MEMORY_BYTES:
        return Check(name="memory", level="ok", detail=f"{size(available)} available")
    return Check(
        name="memory",
        level="warning",
        detail=f"{size(available)} available; a box has 1 GiB by default",
        cure="free some, or give boxes less: sandbox.memory_mb",
    )


def _meminfo(key: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _disk(context: Context) -> list[Check]:
    checks = []
    for name, path in (("state", context.layout.state), ("cache", context.layout.cache)):
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        writable = os.access(existing, os.W_OK)
        variable = f"VOIDBOX_{name.upper()}_DIR"
        if not writable:
            checks.append(
                Check(
                    name=f"{name} directory",
                    level="failed",
                    detail=f"{existing} is not writable",
                    cure=f"change its owner, or set {variable}",
                )
            )
        elif free < DISK_BYTES:
            checks.append(
                Check(
                    name=f"{name} directory",
                    level="warning",
                    detail=f"{path}: {size(free)} free",
                    cure=f"free some (voidbox image prune), or set {variable}",
                )
            )
        else:
            checks.append(Check(name=f"{name} directory", level="ok", detail=f"{path}: {size(free)} free"))
    return checks


def _stack(context: Context) -> list[Check]:
    try:
        stack = context.stack()
    except VoidboxError as error:
        return [Check(name="stack", level="failed", detail=str(error), cure="see the log lines above")]

    async def look() -> list[Check]:
        async with stack.connect() as client:
            return [*(await _services(client)), *(await _host(client)), await _guest_image(client)]

    try:
        return asyncio.run(look())
    except VoidboxError as error:
        return [Check(name="stack", level="failed", detail=str(error), cure="voidbox down, then voidbox up")]


async def _services(client: Client) -> list[Check]:
    status = await client.status(seconds=5)
    checks = [Check(name="orchestrator", level="ok", detail=f"version {status.version}")]
    for service in status.services:
        if service.reachable:
            checks.append(Check(name=service.name, level="ok", detail=service.detail or service.address))
        else:
            checks.append(
                Check(
                    name=service.name,
                    level="failed",
                    detail=f"does not answer at {service.address}: {service.detail}",
                    cure="voidbox status shows more; voidbox down, then voidbox up starts anew",
                )
            )
    return checks


async def _host(client: Client) -> list[Check]:
    try:
        host = await client.capabilities(refresh=True)
    except VoidboxError as error:
        return [Check(name="hypervisor", level="failed", detail=str(error), cure="see voidbox status")]
    checks = [
        Check(
            name=f"probe {probe.name}",
            level="ok" if probe.usable else "failed" if probe.name == "qemu" else "warning",
            detail=probe.detail or ("usable" if probe.usable else "not usable"),
        )
        for probe in host.probes
    ]
    accelerator = hv.Accelerator.Name(host.accelerator).removeprefix("ACCELERATOR_")
    if host.accelerator == hv.ACCELERATOR_UNSPECIFIED:
        checks.append(
            Check(
                name="accelerator",
                level="warning",
                detail="not probed yet; the first box or guest image decides",
            )
        )
    elif host.security_boundary:
        checks.append(Check(name="accelerator", level="ok", detail=accelerator))
    else:
        checks.append(Check(name="accelerator", level="warning", detail=f"{accelerator}: {EMULATION}"))
    return checks


async def _guest_image(client: Client) -> Check:
    request = imager_pb2.ResolveGuestImageRequest()
    try:
        response = await client.call(lambda: client.imager.ResolveGuestImage(request, timeout=30))
    except VoidboxError as error:
        return Check(
            name="guest image", level="failed", detail=str(error), cure="build it: voidbox image build-guest"
        )
    image = response.guest_image
    version = f", kernel {image.kernel_version}" if image.kernel_version else ""
    return Check(name="guest image", level="ok", detail=f"{image.origin}{version}: {image.initramfs_path}")
