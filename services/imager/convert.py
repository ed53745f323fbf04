"""Between protobuf messages and the imager's own types; nothing else knows both."""

from __future__ import annotations

from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.errors import InvalidInput
from services.imager.agents import AgentDisk
from services.imager.disk import DEFAULT_FREE_MIB, Disk
from services.imager.export import ExportFormat
from services.imager.guest_choice import GuestChoice
from services.imager.guest_store import GuestImage
from services.imager.images import CachedImage
from services.imager.manifest import Platform, host_default
from services.imager.progress import Progress
from services.imager.pull import PullPolicy
from services.imager.stored import StoredContent
from services.imager.verify import Damage
from voidbox.common.v1 import common_pb2
from voidbox.imager.v1 import imager_pb2

_POLICIES: Final = {
    imager_pb2.PULL_POLICY_UNSPECIFIED: PullPolicy.MISSING,
    imager_pb2.PULL_POLICY_ALWAYS: PullPolicy.ALWAYS,
    imager_pb2.PULL_POLICY_MISSING: PullPolicy.MISSING,
    imager_pb2.PULL_POLICY_NEVER: PullPolicy.NEVER,
}
_FORMATS: Final = {
    imager_pb2.EXPORT_FORMAT_EXT4: ExportFormat.EXT4,
    imager_pb2.EXPORT_FORMAT_TAR: ExportFormat.TAR,
    imager_pb2.EXPORT_FORMAT_INITRAMFS: ExportFormat.INITRAMFS,
}


def policy_from(value: int) -> PullPolicy:
    """The policy; an unknown number is refused.

    Raises:
        InvalidInput: it is none.
    """
    if value not in _POLICIES:
        raise InvalidInput(f"policy {value} is no pull policy", reason="BAD_POLICY")
    return _POLICIES[value]  # type: ignore[index]


def platform_from(message: imager_pb2.Platform) -> Platform:
    """The platform, the host's where nothing is said.

    Raises:
        InvalidInput: it is malformed, or none that boxes have.
    """
    own = host_default()
    architecture = message.architecture or own.architecture
    wanted = Platform(os=message.os or own.os, architecture=architecture, variant=message.variant)
    return wanted.checked()


def free_mib_from(value: int) -> int:
    """Room on a disk; 0 means the default."""
    if value < 0:
        raise InvalidInput(f"free_mib is {value}; it must not be negative", reason="BAD_SIZE")
    return value or DEFAULT_FREE_MIB


def wants_slim_kernel(value: int) -> bool:
    """Whether a guest image gets the slim kernel instead of Debian's.

    Raises:
        InvalidInput: an unknown number.
    """
    if value not in imager_pb2.KernelFlavor.values():
        raise InvalidInput(f"{value} is no kernel flavor", reason="BAD_KERNEL_FLAVOR")
    return value == imager_pb2.KERNEL_FLAVOR_SLIM


def format_from(value: int) -> ExportFormat:
    """What an image is exported as.

    Raises:
        InvalidInput: no format is named, or an unknown number.
    """
    if value not in _FORMATS:
        raise InvalidInput("name a format: ext4, tar or initramfs", reason="BAD_FORMAT")
    return _FORMATS[value]  # type: ignore[index]


def piece_to(part: bytes | int) -> imager_pb2.ExportImageResponse:
    """Data, or the length of a hole."""
    if isinstance(part, int):
        return imager_pb2.ExportImageResponse(zeros=part)
    return imager_pb2.ExportImageResponse(data=part)


def stored_to(item: StoredContent) -> imager_pb2.StoredContent:
    """A piece of the cache that is no image."""
    return imager_pb2.StoredContent(
        kind=item.kind,
        name=item.name,
        digest=common_pb2.Digest(value=item.digest),
        path=str(item.path),
        size_bytes=item.size_bytes,
        use_time=_timestamp(item.use_time),
        is_default=item.is_default,
    )


def damage_to(damage: Damage) -> imager_pb2.DamagedContent:
    """A damaged piece of the cache."""
    return imager_pb2.DamagedContent(
        kind=damage.kind, digest=damage.digest, path=str(damage.path), removed=damage.removed
    )


def seconds_from(message: Duration) -> float:
    """A duration in seconds."""
    return message.seconds + message.nanos / 1e9


def progress_to(progress: Progress) -> imager_pb2.Progress:
    """How far a piece of work is."""
    return imager_pb2.Progress(
        subject=progress.subject,
        action=progress.action,
        done=progress.done,
        total=progress.total,
        unit=progress.unit,
    )


def image_to(image: CachedImage) -> imager_pb2.Image:
    """A cached image."""
    config = image.config
    return imager_pb2.Image(
        reference=image.reference,
        digest=common_pb2.Digest(value=image.digest),
        platform=imager_pb2.Platform(
            os=image.platform.os, architecture=image.platform.architecture, variant=image.platform.variant
        ),
        config=imager_pb2.ImageConfig(
            entrypoint=config.entrypoint,
            cmd=config.cmd,
            env=config.env,
            working_dir=config.working_dir,
            user=config.user,
            labels=dict(config.labels),
        ),
        layers=[
            imager_pb2.Layer(
                digest=common_pb2.Digest(value=layer.digest, size_bytes=layer.size),
                diff_id=diff_id,
                media_type=layer.media_type,
            )
            for layer, diff_id in zip(image.manifest.layers, config.diff_ids, strict=True)
        ],
        pull_time=_timestamp(image.pull_time),
        use_time=_timestamp(image.use_time),
        size_bytes=image.size_bytes,
    )


def disk_to(disk: Disk, image: CachedImage) -> imager_pb2.DiskImage:
    """A disk and the image that it was made of."""
    return imager_pb2.DiskImage(
        path=str(disk.path),
        digest=common_pb2.Digest(value=disk.digest),
        format="raw",
        size_bytes=disk.size_bytes,
        image=image_to(image),
    )


def agent_disk_to(agent: AgentDisk) -> imager_pb2.DiskImage:
    """The disk of an agent's program."""
    return imager_pb2.DiskImage(
        path=str(agent.disk.path),
        digest=common_pb2.Digest(value=agent.disk.digest),
        format="raw",
        size_bytes=agent.disk.size_bytes,
        program=agent.package.program,
        version=agent.package.version,
    )


def guest_to(choice: GuestChoice) -> imager_pb2.GuestImage:
    """A kernel and an initramfs."""
    digest = common_pb2.Digest(value=choice.digest) if choice.digest else None
    return imager_pb2.GuestImage(
        kernel_path=str(choice.kernel),
        initramfs_path=str(choice.initramfs),
        digest=digest,
        origin=choice.origin,
        kernel_version=choice.release,
    )


def guest_image_to(image: GuestImage) -> imager_pb2.GuestImage:
    """A guest image of the cache."""
    return imager_pb2.GuestImage(
        kernel_path=str(image.kernel),
        initramfs_path=str(image.initramfs),
        digest=common_pb2.Digest(value=image.digest),
        origin="image",
        kernel_version=image.release,
    )


def _timestamp(seconds: float) -> Timestamp:
    whole = int(seconds // 1)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e9))
