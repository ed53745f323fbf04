"""What this host can run, found out by running it.

`/dev/kvm` may exist and open and still not run a normal kernel (nested and paravirtualized hosts),
so KVM counts only after the guest's own kernel has printed something on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import InvalidInput, VoidboxError, WrongState
from services.common.process import clean_env
from services.hypervisor import host_confinement, inputs, programs, reclaim, record
from services.hypervisor.egress import host_network
from services.hypervisor.inputs import Identity
from services.hypervisor.model import Accelerator, Transport
from services.hypervisor.pidfd import host_boot_id
from services.hypervisor.programs import Programs

log = logging.getLogger(__name__)

KVM = "/dev/kvm"
VHOST_VSOCK = "/dev/vhost-vsock"
# On working KVM a kernel prints within 0.3 s; one that never prints costs this once per host boot.
KVM_SECONDS = 5.0
_MAX_CACHED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """One probe: what was tried, whether it can be used, what happened and the cure."""

    name: str
    usable: bool
    detail: str


class Prober:
    """Probes on demand and remembers, KVM also on disk for this boot of the host.

    Args:
        cache: The file that remembers.
        identity: Who machines run as.
        system: QEMU's name or path.
        image: qemu-img's name or path.
        tun: The tun device.
    """

    def __init__(
        self, cache: Path, identity: Identity, *, system: str, image: str, tun: str = "/dev/net/tun"
    ) -> None:
        self._cache = cache
        self._identity = identity
        self._system = system
        self._image = image
        self._tun = tun
        self._programs: Programs | None = None
        self._lock = asyncio.Lock()
        self._last_kernel = ""

    async def programs(self) -> Programs:
        """QEMU's programs.

        Raises:
            WrongState: they are missing or too old; asked again each time.
        """
        if self._programs is None or not os.path.exists(self._programs.system):
            found = await programs.find(self._system, self._image)
            confinement = await host_confinement.find(found.system, self._identity.uid)
            if not confinement.whole:
                log.warning("machines are not wholly confined on this host: %s", confinement.detail)
            if why := await reclaim.supported():
                log.warning("boxes keep what memory their guests free on this host: %s", why)
            self._programs = dataclasses.replace(found, confinement=confinement, reclaims=not why)
        return self._programs

    def forget(self) -> None:
        """Find the programs anew at the next question."""
        self._programs = None

    async def accelerator(self, kernel_path: str, wanted: Accelerator | None) -> Accelerator:
        """What boxes with this kernel get.

        Raises:
            InvalidInput: `wanted` cannot be had on this host.
        """
        if wanted is Accelerator.TCG:
            return wanted
        kvm = await self.kvm(kernel_path)
        if wanted is Accelerator.KVM and not kvm.usable:
            raise InvalidInput(
                f"accelerator KVM cannot be used on this host: {kvm.detail}",
                reason="NO_KVM",
                field="accelerator",
            )
        return Accelerator.KVM if kvm.usable else Accelerator.TCG

    async def kvm(self, kernel_path: str, *, refresh: bool = False) -> ProbeResult:
        """Whether KVM runs this kernel. An empty path means the last one used; none: not tried."""
        try:
            inputs.check_device_access(KVM, self._identity)
        except WrongState as error:
            return ProbeResult(name="kvm", usable=False, detail=error.message)
        kernel_path = kernel_path or self._last_kernel
        if not kernel_path:
            return ProbeResult(
                name="kvm",
                usable=False,
                detail=f"{KVM} can be opened; not tried yet, since no kernel was named",
            )
        self._last_kernel = kernel_path
        async with self._lock:
            found = await self.programs()
            key = await asyncio.to_thread(self._key, kernel_path, found)
            cached = None if refresh else self._read().get(key)
            if cached is not None:
                return ProbeResult(name="kvm", usable=bool(cached["usable"]), detail=str(cached["detail"]))
            result = await self._boot(kernel_path, found)
            entries = dict(list(self._read().items())[-_MAX_CACHED:])
            entries[key] = {"usable": result.usable, "detail": result.detail}
            document = {"boot": host_boot_id(), "kvm": entries}
            record.write_atomically(self._cache, json.dumps(document).encode())
            return result

    def _key(self, kernel_path: str, found: Programs) -> str:
        fd = inputs.open_kernel(kernel_path)
        try:
            info = os.fstat(fd)
        finally:
            os.close(fd)
        return f"{kernel_path}:{info.st_size}:{info.st_mtime_ns}:{found.version}:{self._identity.uid}"

    def _read(self) -> dict[str, dict[str, object]]:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            document = json.loads(self._cache.read_bytes())
            if document.get("boot") == host_boot_id():
                entries: dict[str, dict[str, object]] = document["kvm"]
                return entries
        return {}

    async def _boot(self, kernel_path: str, found: Programs) -> ProbeResult:
        """Run the kernel on KVM until it prints something, without any device but the console."""
        fd = inputs.open_kernel(kernel_path)
        drop = os.geteuid() == 0
        fd = await asyncio.to_thread(inputs.reopenable, fd, self._identity)
        argv = [
            found.system,
            *("-machine", "q35,accel=kvm", "-cpu", "host", "-m", "256M", "-nodefaults", "-no-user-config"),
            *("-no-reboot", "-display", "none", "-nic", "none", "-serial", "stdio"),
            *("-kernel", f"/dev/fd/{fd}", "-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1 reboot=t"),
        ]
        try:
            child = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=clean_env(),
                pass_fds=(fd,),
                cwd="/",
                user=self._identity.uid if drop else None,
                group=self._identity.gid if drop else None,
                extra_groups=inputs.device_groups(os.stat(KVM)) if drop else None,
            )
        finally:
            os.close(fd)
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            async with asyncio.timeout(KVM_SECONDS):
                printed = await child.stdout.read(4096)
            if printed:
                return ProbeResult(name="kvm", usable=True, detail=f"the guest's kernel runs on {KVM}")
            said = (await child.stderr.read(4096)).decode(errors="replace").strip()
            detail = f"QEMU ended before the guest's kernel printed anything: {said or 'it said nothing'}"
        except TimeoutError:
            detail = (
                f"{KVM} can be opened, but the guest's kernel printed nothing within {KVM_SECONDS:g} s: "
                "this host does not run ordinary guests; boxes are emulated instead"
            )
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.communicate()
        return ProbeResult(name="kvm", usable=False, detail=detail)

    def transport(self) -> Transport:
        """The vsock transport that boxes get."""
        return Transport.VHOST if self.vhost_vsock().usable else Transport.VHOST_USER

    def vhost_vsock(self) -> ProbeResult:
        """Whether the kernel's vsock device can be opened by this service, which hands it on."""
        try:
            os.close(os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            detail = f"{VHOST_VSOCK}: {error.strerror}; voidbox's own device is used instead"
            return ProbeResult(name="vhost-vsock", usable=False, detail=detail)
        return ProbeResult(name="vhost-vsock", usable=True, detail=f"{VHOST_VSOCK} can be opened")

    async def confinement(self) -> ProbeResult:
        """What machines are confined by, with what the host denies."""
        try:
            found = (await self.programs()).confinement
        except VoidboxError as error:
            return ProbeResult(name="confinement", usable=False, detail=error.message)
        return ProbeResult(name="confinement", usable=found.whole, detail=found.detail)

    async def network(self) -> ProbeResult:
        """Whether boxes can have a network; one is made to find out."""
        why = await host_network.find(self._tun)
        detail = why or "namespaces, a tap and nftables rules, without root"
        return ProbeResult(name="network", usable=not why, detail=detail)

    async def qemu(self) -> ProbeResult:
        """Whether QEMU is installed."""
        try:
            found = await self.programs()
        except VoidboxError as error:
            return ProbeResult(name="qemu", usable=False, detail=error.message)
        return ProbeResult(name="qemu", usable=True, detail=f"{found.system}, version {found.version}")
