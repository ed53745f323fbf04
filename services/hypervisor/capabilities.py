"""What the host can do, as one answer."""

from __future__ import annotations

from services.hypervisor import convert
from services.hypervisor.model import Accelerator
from services.hypervisor.probe import Prober, ProbeResult
from services.hypervisor.registry import Registry
from voidbox.hypervisor.v1 import hypervisor_pb2

MISSING_FEATURES = ("update",)


async def describe_host(
    registry: Registry, prober: Prober, *, kernel_path: str, refresh: bool
) -> hypervisor_pb2.GetCapabilitiesResponse:
    """Probe what has not been probed and sum it up.

    Raises:
        InvalidInput: `kernel_path` is no kernel.
    """
    if refresh:
        prober.forget()
    qemu = await prober.qemu()
    version = ""
    kvm = ProbeResult(name="kvm", usable=False, detail="not tried, since QEMU cannot be used")
    if qemu.usable:
        version = (await prober.programs()).version
        kvm = await prober.kvm(kernel_path, refresh=refresh)
    accelerator = Accelerator.KVM if kvm.usable else Accelerator.TCG
    tcg = ProbeResult(
        name="tcg",
        usable=qemu.usable,
        detail="QEMU's translation: emulation, not a security boundary" if qemu.usable else qemu.detail,
    )
    host, room = registry.room()
    probes = (qemu, kvm, tcg, prober.vhost_vsock(), await prober.confinement(), await prober.network())
    return hypervisor_pb2.GetCapabilitiesResponse(
        accelerator=convert.accelerator(accelerator),
        security_boundary=accelerator.security_boundary,
        vsock_transport=convert.transport(prober.transport()),
        qemu_version=version,
        host_memory_mib=host.memory_mib,
        available_memory_mib=room.memory_mib,
        host_cpus=host.cpus,
        probes=map(convert.probe, probes),
        missing_features=MISSING_FEATURES,
    )
