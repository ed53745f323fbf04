"""What a box is made of and what is known of it, free of protobuf types."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.common.errors import InvalidInput
from services.hypervisor.states import BoxState

BOX_ID = re.compile(r"[a-z][a-z0-9-]{0,62}")


def check_box_id(box_id: str) -> str:
    """`box_id` itself, which is then safe as a file name and as a DNS label.

    Raises:
        InvalidInput: it is not 1 to 63 of [a-z0-9-] starting with a letter.
    """
    if not BOX_ID.fullmatch(box_id) or box_id.endswith("-"):
        raise InvalidInput(
            f"box id {box_id!r} must be 1 to 63 of [a-z0-9-], start with a letter and not end with '-'",
            reason="BAD_BOX_ID",
            box=box_id,
        )
    return box_id


class Accelerator(enum.Enum):
    """What executes the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"

    @property
    def security_boundary(self) -> bool:
        """Whether the processor enforces it; QEMU's own translation makes no such promise."""
        return self is Accelerator.KVM


class Transport(enum.Enum):
    """How vsock reaches the guest."""

    VHOST = "vhost"
    VHOST_USER = "vhost-user"


class MountMode(enum.Enum):
    """What a box may do with a mount."""

    READ_ONLY = "ro"
    READ_WRITE = "rw"
    OVERLAY = "overlay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Memory, processors and disk; `disk_mib` 0 means the image's size plus 1024 MiB."""

    memory_mib: int = 1024
    vcpus: int = 1
    disk_mib: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk on a read-only base image, with a private layer above it if it is writable; or a volume."""

    base_path: str = ""
    base_digest: str = ""
    base_size: int = 0
    format: str = "raw"
    writable: bool = False
    guest_path: str = ""
    volume: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A share of a host directory."""

    host_path: str
    guest_path: str
    mode: MountMode = MountMode.READ_ONLY


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What the programs of a box may take (0: no limit) and execute (empty: everything)."""

    memory_bytes: int = 0
    processes: int = 0
    cpu_millis: int = 0
    open_files: int = 0
    file_size_bytes: int = 0
    allowed_programs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxConfig:
    """What a box is made of. Times are in seconds; 0 means no limit.

    `egress` is a policy as `services.common.egress.plain` writes it; empty: the box has no network device.
    `interceptions` is what `services.hypervisor.egress.credential` writes.
    """

    kernel_path: str
    initramfs_path: str
    resources: Resources = field(default_factory=Resources)
    root_disk: Disk | None = None
    disks: tuple[Disk, ...] = ()
    mounts: tuple[Mount, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    accelerator: Accelerator | None = None
    max_lifetime: float = 0.0
    idle_timeout: float = 0.0
    auto_pause: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    hostname: str = ""
    confinement: Confinement = field(default_factory=Confinement)
    cold_boot: bool = False
    holds_secrets: bool = False
    snapshot: str = ""
    egress: str = ""
    interceptions: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of a box's start and the seconds it took."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxRecord:
    """All that is known of a box; what the box directory's `state.json` holds.

    Times are seconds since the epoch, 0 while the event is still to come. `shim_pid` and
    `shim_start` (its start time in clock ticks since the host's boot) name the process
    together: a pid alone may be somebody else's by now. `asked` is the configuration that the box was
    created with, once it has another.
    """

    id: str
    config: BoxConfig
    state: BoxState = BoxState.STARTING
    reason: str = ""
    create_time: float = 0.0
    ready_time: float = 0.0
    end_time: float = 0.0
    boot_id: str = ""
    accelerator: Accelerator = Accelerator.TCG
    transport: Transport = Transport.VHOST_USER
    cid: int = 0
    shim_pid: int = 0
    shim_start: int = 0
    vmm_pid: int = 0
    host_boot_id: str = ""
    origin: str = "boot"
    capturing: bool = False
    auto_paused: bool = False
    asked: BoxConfig | None = None
    phases: tuple[Phase, ...] = ()
