"""Between protobuf messages and the dataclasses inside; requests are validated here."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from google.protobuf import duration_pb2, timestamp_pb2

from services.common.errors import InvalidInput
from services.hypervisor import volumes
from services.hypervisor.convert_credentials import read_interceptions, write_interceptions
from services.hypervisor.convert_egress import egress, read_egress
from services.hypervisor.inputs import DIGEST
from services.hypervisor.model import (
    Accelerator,
    BoxConfig,
    BoxRecord,
    Confinement,
    Disk,
    Mount,
    MountMode,
    Resources,
    Transport,
)
from services.hypervisor.prepare import unsupported
from services.hypervisor.probe import ProbeResult
from services.hypervisor.snapshots import Snapshot, check_name
from services.hypervisor.states import BoxState
from services.hypervisor.templates import Template
from services.hypervisor.update import Changes
from services.hypervisor.volumes import Volume
from voidbox.common.v1 import common_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2

_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_MAX_SECONDS = 10 * 366 * 86400
_MAX_ENTRIES = 256
_MAX_TEXT = 32 * 1024
_MAX_NAME = 4096
DEFAULT_PAGE, MAX_PAGE = 100, 1000

_ACCELERATORS = {
    hypervisor_pb2.ACCELERATOR_UNSPECIFIED: None,
    hypervisor_pb2.ACCELERATOR_KVM: Accelerator.KVM,
    hypervisor_pb2.ACCELERATOR_TCG: Accelerator.TCG,
}
_MODES = {
    common_pb2.MOUNT_MODE_UNSPECIFIED: MountMode.READ_ONLY,
    common_pb2.MOUNT_MODE_READ_ONLY: MountMode.READ_ONLY,
    common_pb2.MOUNT_MODE_READ_WRITE: MountMode.READ_WRITE,
    common_pb2.MOUNT_MODE_OVERLAY: MountMode.OVERLAY,
}
_STATES = {
    BoxState.STARTING: hypervisor_pb2.BOX_STATE_STARTING,
    BoxState.RUNNING: hypervisor_pb2.BOX_STATE_RUNNING,
    BoxState.PAUSED: hypervisor_pb2.BOX_STATE_PAUSED,
    BoxState.STOPPING: hypervisor_pb2.BOX_STATE_STOPPING,
    BoxState.STOPPED: hypervisor_pb2.BOX_STATE_STOPPED,
    BoxState.FAILED: hypervisor_pb2.BOX_STATE_FAILED,
}


def seconds(value: duration_pb2.Duration, field: str) -> float:
    """A duration in seconds.

    Raises:
        InvalidInput: it is negative or beyond ten years.
    """
    found = value.seconds + value.nanos / 1e9
    if not 0 <= found <= _MAX_SECONDS:
        raise InvalidInput(f"{field} is {found:g} s; it must be 0 to {_MAX_SECONDS}", field=field)
    return found


def duration(value: float) -> duration_pb2.Duration:
    """Seconds as a message."""
    nanos = round(value * 1e9)
    return duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def timestamp(value: float) -> timestamp_pb2.Timestamp | None:
    """Seconds since the epoch as a message; None for 0, an event still to come."""
    if not value:
        return None
    micros = round(value * 1e6)
    return timestamp_pb2.Timestamp(seconds=micros // 10**6, nanos=micros % 10**6 * 1000)


def read_config(message: hypervisor_pb2.BoxConfig) -> BoxConfig:
    """What a box is to be made of.

    Raises:
        InvalidInput: a value that cannot be; the message names the field.
        NotBuilt: a feature of a later version.
    """
    if message.accelerator not in _ACCELERATORS:
        raise InvalidInput(
            f"accelerator {_name(hypervisor_pb2.Accelerator, message.accelerator)} cannot be had here; "
            "leave it out for the best one",
            reason="NO_ACCELERATOR",
            field="accelerator",
        )
    if message.hostname and not _HOSTNAME.fullmatch(message.hostname):
        raise InvalidInput(f"hostname {message.hostname!r} is not a DNS label", field="hostname")
    for name in message.env:
        if not name or "=" in name:
            raise InvalidInput(f"env: {name!r} is no name of an environment variable", field="env")
    if message.snapshot:
        check_name(message.snapshot)
    kernel, initramfs = message.kernel_path, message.initramfs_path
    if kernel or initramfs or not message.snapshot:
        kernel, initramfs = _path(kernel, "kernel_path"), _path(initramfs, "initramfs_path")
    return BoxConfig(
        kernel_path=kernel,
        initramfs_path=initramfs,
        resources=Resources(
            memory_mib=message.resources.memory_mib or 1024,
            vcpus=message.resources.vcpus or 1,
            disk_mib=message.resources.disk_mib,
        ),
        root_disk=_read_disk(message.root_disk) if message.HasField("root_disk") else None,
        disks=tuple(map(_read_disk, message.disks)),
        mounts=tuple(map(_read_mount, message.mounts)),
        env=_entries(message.env, "env"),
        accelerator=_ACCELERATORS[message.accelerator],
        max_lifetime=seconds(message.max_lifetime, "max_lifetime"),
        idle_timeout=seconds(message.idle_timeout, "idle_timeout"),
        auto_pause=seconds(message.auto_pause, "auto_pause"),
        labels=_entries(message.labels, "labels"),
        hostname=message.hostname,
        cold_boot=message.cold_boot,
        confinement=_read_confinement(message.confinement),
        holds_secrets=message.holds_secrets,
        snapshot=message.snapshot,
        egress=read_egress(message.egress),
        interceptions=read_interceptions(message),
    )


def read_changes(message: hypervisor_pb2.UpdateBoxRequest) -> Changes:
    """What is to be changed of a box.

    Raises:
        InvalidInput: a value that cannot be; the message names the field.
        NotBuilt: a feature of a later version.
    """
    if message.HasField("egress"):
        raise unsupported("a new network policy for a running box (egress)")

    def time(field: str) -> float | None:
        return seconds(getattr(message, field), field) if message.HasField(field) else None  # type: ignore[arg-type]

    return Changes(
        resources=Resources(
            memory_mib=message.resources.memory_mib,
            vcpus=message.resources.vcpus,
            disk_mib=message.resources.disk_mib,
        ),
        limits=_read_confinement(common_pb2.Confinement(limits=message.limits)),
        max_lifetime=time("max_lifetime"),
        idle_timeout=time("idle_timeout"),
        auto_pause=time("auto_pause"),
        labels=_entries(message.labels, "labels"),
    )


def _name(kind: type[hypervisor_pb2.Accelerator], number: hypervisor_pb2.Accelerator.ValueType) -> str:
    return kind.Name(number) if number in kind.values() else str(number)


def _path(text: str, field: str) -> str:
    if not text:
        raise InvalidInput(f"{field} is missing", reason="MISSING_FIELD", field=field)
    if "\0" in text:
        raise InvalidInput(f"{field} holds a NUL byte", field=field)
    return text


def _entries(values: Mapping[str, str], field: str) -> dict[str, str]:
    if len(values) > _MAX_ENTRIES:
        raise InvalidInput(f"{field} has {len(values)} entries; at most {_MAX_ENTRIES}", field=field)
    for name, value in values.items():
        if len(name) + len(value) > _MAX_TEXT or "\0" in name + value:
            raise InvalidInput(f"{field}: {name[:64]!r} is too long or holds a NUL byte", field=field)
    return dict(values)


def _read_confinement(message: common_pb2.Confinement) -> Confinement:
    limits = message.limits
    for field, _ in limits.DESCRIPTOR.fields_by_name.items():
        if getattr(limits, field) < 0:
            raise InvalidInput(f"confinement.limits.{field} is negative; 0 means no limit", field=field)
    if len(message.allowed_programs) > _MAX_ENTRIES:
        raise InvalidInput(
            f"{len(message.allowed_programs)} allowed programs; at most {_MAX_ENTRIES}, or name directories",
            field="allowed_programs",
        )
    for entry in message.allowed_programs:
        if not entry or "\0" in entry or len(entry) > _MAX_NAME or ("/" in entry and entry[0] != "/"):
            raise InvalidInput(
                f"allowed program {entry[:64]!r} is neither a name nor an absolute path",
                field="allowed_programs",
            )
    return Confinement(
        memory_bytes=limits.memory_bytes,
        processes=limits.processes,
        cpu_millis=limits.cpu_millis,
        open_files=limits.open_files,
        file_size_bytes=limits.file_size_bytes,
        allowed_programs=tuple(message.allowed_programs),
    )


def confinement(value: Confinement) -> common_pb2.Confinement:
    """A box's confinement as clients and the guest see it."""
    return common_pb2.Confinement(
        limits=common_pb2.Limits(
            memory_bytes=value.memory_bytes,
            processes=value.processes,
            cpu_millis=value.cpu_millis,
            open_files=value.open_files,
            file_size_bytes=value.file_size_bytes,
        ),
        allowed_programs=value.allowed_programs,
    )


def _read_disk(message: hypervisor_pb2.Disk) -> Disk:
    if message.volume:
        return _read_volume(message)
    if message.base_digest.value and not DIGEST.fullmatch(message.base_digest.value):
        raise InvalidInput(f"disk {message.base_path}: {message.base_digest.value!r} is not a sha256 digest")
    return Disk(
        base_path=_path(message.base_path, "base_path"),
        base_digest=message.base_digest.value,
        base_size=message.base_digest.size_bytes,
        format=message.format or "raw",
        writable=message.writable,
        guest_path=message.guest_path,
    )


def _read_volume(message: hypervisor_pb2.Disk) -> Disk:
    volumes.check_name(message.volume)
    if message.base_path or not message.writable or not message.guest_path:
        raise InvalidInput(
            f"volume {message.volume}: it needs a guest_path, must be writable and has no base_path",
            reason="BAD_DISK",
        )
    return Disk(volume=message.volume, writable=True, guest_path=message.guest_path)


def _read_mount(message: common_pb2.Mount) -> Mount:
    if message.mode not in _MODES:
        raise InvalidInput(f"mount {message.host_path}: unknown mode {message.mode}", reason="BAD_MOUNT")
    return Mount(
        host_path=_path(message.host_path, "mounts.host_path"),
        guest_path=_path(message.guest_path, "mounts.guest_path"),
        mode=_MODES[message.mode],
    )


def box(record: BoxRecord) -> hypervisor_pb2.Box:
    """A box as clients see it."""
    return hypervisor_pb2.Box(
        id=record.id,
        config=_config(record.config),
        state=_STATES[record.state],
        reason=record.reason,
        create_time=timestamp(record.create_time),
        ready_time=timestamp(record.ready_time),
        end_time=timestamp(record.end_time),
        boot_id=record.boot_id,
        accelerator=accelerator(record.accelerator),
        vmm_pid=record.vmm_pid if record.state.alive else 0,
        origin=record.origin,
        auto_paused=record.auto_paused and record.state is BoxState.PAUSED,
        phases=[
            hypervisor_pb2.Phase(name=phase.name, duration=duration(phase.seconds)) for phase in record.phases
        ],
    )


def _config(config: BoxConfig) -> hypervisor_pb2.BoxConfig:
    modes = {ours: theirs for theirs, ours in _MODES.items()}
    message = hypervisor_pb2.BoxConfig(
        kernel_path=config.kernel_path,
        initramfs_path=config.initramfs_path,
        resources=common_pb2.Resources(
            memory_mib=config.resources.memory_mib,
            vcpus=config.resources.vcpus,
            disk_mib=config.resources.disk_mib,
        ),
        root_disk=_disk(config.root_disk) if config.root_disk else None,
        disks=[_disk(disk) for disk in config.disks],
        mounts=[
            common_pb2.Mount(host_path=each.host_path, guest_path=each.guest_path, mode=modes[each.mode])
            for each in config.mounts
        ],
        env=config.env,
        accelerator=accelerator(config.accelerator),
        labels=config.labels,
        hostname=config.hostname,
        cold_boot=config.cold_boot,
        confinement=None if config.confinement == Confinement() else confinement(config.confinement),
        holds_secrets=config.holds_secrets,
        snapshot=config.snapshot,
        egress=egress(config.egress) if config.egress else None,
    )
    if config.interceptions:
        write_interceptions(config.interceptions, message)
    if config.max_lifetime:
        message.max_lifetime.CopyFrom(duration(config.max_lifetime))
    if config.idle_timeout:
        message.idle_timeout.CopyFrom(duration(config.idle_timeout))
    if config.auto_pause:
        message.auto_pause.CopyFrom(duration(config.auto_pause))
    return message


def _disk(disk: Disk) -> hypervisor_pb2.Disk:
    return hypervisor_pb2.Disk(
        base_path=disk.base_path,
        base_digest=common_pb2.Digest(value=disk.base_digest, size_bytes=disk.base_size),
        format=disk.format,
        writable=disk.writable,
        guest_path=disk.guest_path,
        volume=disk.volume,
    )


def accelerator(value: Accelerator | None) -> hypervisor_pb2.Accelerator.ValueType:
    """An accelerator as clients see it."""
    return next(theirs for theirs, ours in _ACCELERATORS.items() if ours is value)


def transport(value: Transport) -> hypervisor_pb2.VsockTransport.ValueType:
    """A transport as clients see it."""
    if value is Transport.VHOST:
        return hypervisor_pb2.VSOCK_TRANSPORT_VHOST
    return hypervisor_pb2.VSOCK_TRANSPORT_VHOST_USER


def probe(result: ProbeResult) -> hypervisor_pb2.Probe:
    """A probe's outcome as clients see it."""
    return hypervisor_pb2.Probe(name=result.name, usable=result.usable, detail=result.detail)


def template(value: Template, pooled: int) -> hypervisor_pb2.Template:
    """A template as clients see it; `pooled` of its machines wait."""
    return hypervisor_pb2.Template(
        id=value.id,
        kernel_path=value.kernel_path,
        initramfs_path=value.initramfs_path,
        resources=common_pb2.Resources(memory_mib=value.memory_mib, vcpus=value.vcpus),
        create_time=timestamp(value.create_time),
        use_time=timestamp(value.use_time),
        size_bytes=value.size_bytes,
        pooled=pooled,
    )


def snapshot(value: Snapshot) -> hypervisor_pb2.Snapshot:
    """A snapshot as clients see it."""
    return hypervisor_pb2.Snapshot(
        name=value.id,
        box_id=value.box_id,
        create_time=timestamp(value.create_time),
        size_bytes=value.size_bytes,
        digest=common_pb2.Digest(value=value.digest),
        has_secrets=value.has_secrets,
        resources=common_pb2.Resources(
            memory_mib=value.resources.memory_mib,
            vcpus=value.resources.vcpus,
            disk_mib=value.resources.disk_mib,
        ),
    )


class Listed(Protocol):
    """What can be listed in order of creation."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def create_time(self) -> float:
        """Seconds since the epoch."""
        ...


_Listed = TypeVar("_Listed", bound=Listed)


def page(records: Sequence[_Listed], size: int, token: str) -> tuple[Sequence[_Listed], str]:
    """One page of `records`, in order of creation, and the token of the next; empty on the last.

    Raises:
        InvalidInput: a size or token that cannot be.
    """
    if not 0 <= size <= MAX_PAGE:
        raise InvalidInput(f"page_size is {size}; it must be 0 to {MAX_PAGE}", field="page_size")
    ordered = sorted(records, key=lambda each: (each.create_time, each.id))
    if token:
        try:
            time_text, _, box_id = base64.urlsafe_b64decode(token.encode()).decode().partition(" ")
            after = (float(time_text), box_id)
        except (ValueError, binascii.Error) as error:
            raise InvalidInput("page_token is not one of ours", field="page_token") from error
        ordered = [each for each in ordered if (each.create_time, each.id) > after]
    found = ordered[: size or DEFAULT_PAGE]
    if len(found) == len(ordered):
        return found, ""
    last = f"{found[-1].create_time!r} {found[-1].id}"
    return found, base64.urlsafe_b64encode(last.encode()).decode()


def volume(one: Volume, box_id: str) -> hypervisor_pb2.Volume:
    """A volume and the box that uses it, or an empty id."""
    return hypervisor_pb2.Volume(
        name=one.name, size_mib=one.size_mib, used_bytes=one.used_bytes, box_id=box_id
    )
