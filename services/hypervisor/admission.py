"""Whether the host has room for one more box: memory, processors, disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import Exhausted, InvalidInput
from services.hypervisor.model import BoxRecord, Resources

MIN_MEMORY_MIB = 16
MAX_VCPUS = 64
# Beside the guest's memory: QEMU's own (150 MiB after boot and some programs, of which 110 are translated
# code) and the device process (12 MiB).
OVERHEAD_MIB = 160
# State, logs and sockets of a box; its writable disks grow as the guest writes.
MIN_FREE_DISK_MIB = 64
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Memory in MiB and processors, as this process may use them (cgroup limits included)."""

    memory_mib: int
    available_mib: int
    cpus: int

    @classmethod
    def measure(cls) -> Host:
        """The host now."""
        fields = {}
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            fields[name] = int(rest.split()[0]) // 1024
        total, available = fields["MemTotal"], fields["MemAvailable"]
        limit, used = _cgroup_memory()
        if limit is not None:
            total, available = min(total, limit), min(available, max(0, limit - used))
        return cls(memory_mib=total, available_mib=available, cpus=len(os.sched_getaffinity(0)))


def _cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """Limit and use of our own cgroup (v2) in MiB; a container sees its own as the root."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return None, 0
    return (None if limit == "max" else int(limit) // _MIB), used // _MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What new boxes can still have: `memory_mib` by promise and by what is free now."""

    memory_mib: int
    promised_mib: int


def room(host: Host, boxes: Iterable[tuple[BoxRecord, int]], overcommit: float) -> Room:
    """The room that is left.

    Args:
        host: The host's memory.
        boxes: The boxes that live, with their resident memory in MiB. A guest's memory is
            promised whole but taken only as it is touched.
        overcommit: Promised memory may reach this multiple of the host's.
    """
    promised = untouched = 0
    for record, resident in boxes:
        need = record.config.resources.memory_mib + OVERHEAD_MIB
        promised += need
        untouched += max(0, need - resident)
    by_promise = int(host.memory_mib * overcommit) - promised
    by_free = host.available_mib - int(untouched / max(overcommit, 1.0))
    return Room(memory_mib=max(0, min(by_promise, by_free)), promised_mib=promised)


def check_resources(wanted: Resources, host: Host) -> None:
    """Refuse what this host can never give.

    Raises:
        InvalidInput: memory, processors or disk out of bounds.
    """
    if wanted.memory_mib < MIN_MEMORY_MIB:
        raise InvalidInput(
            f"resources.memory_mib is {wanted.memory_mib}; a box needs at least {MIN_MEMORY_MIB}",
            reason="MEMORY_TOO_SMALL",
            field="resources.memory_mib",
        )
    if wanted.memory_mib + OVERHEAD_MIB > host.memory_mib:
        raise InvalidInput(
            f"resources.memory_mib is {wanted.memory_mib}, but the host has {host.memory_mib} MiB "
            f"of which {OVERHEAD_MIB} go to the machine itself; ask for at most "
            f"{max(0, host.memory_mib - OVERHEAD_MIB)} (spec: sandbox.memory_mb)",
            reason="MEMORY_OVER_HOST",
            field="resources.memory_mib",
        )
    if not 1 <= wanted.vcpus <= MAX_VCPUS:
        raise InvalidInput(
            f"resources.vcpus is {wanted.vcpus}; it must be 1 to {MAX_VCPUS}",
            reason="BAD_VCPUS",
            field="resources.vcpus",
        )
    if not 0 <= wanted.disk_mib <= 1 << 24:
        raise InvalidInput(
            f"resources.disk_mib is {wanted.disk_mib}; it must be 0 to {1 << 24}",
            reason="BAD_DISK_SIZE",
            field="resources.disk_mib",
        )


def check_room(wanted: Resources, host: Host, left: Room, overcommit: float) -> None:
    """Refuse what this host cannot give now.

    Raises:
        Exhausted: other boxes or programs have the memory.
    """
    need = wanted.memory_mib + OVERHEAD_MIB
    if need > left.memory_mib:
        raise Exhausted(
            f"a box of {wanted.memory_mib} MiB needs {need} MiB, but {left.memory_mib} of the host's "
            f"{host.memory_mib} MiB are left ({left.promised_mib} promised to boxes, {host.available_mib} "
            f"free); stop boxes, ask for less (spec: sandbox.memory_mb) or raise "
            f"VOIDBOX_HYPERVISOR_MEMORY_OVERCOMMIT (now {overcommit:g})",
            reason="HOST_MEMORY",
            needed_mib=need,
            available_mib=left.memory_mib,
        )


def check_disk(directory: Path) -> None:
    """Refuse to start a box on a disk that is as good as full.

    Raises:
        Exhausted: less than `MIN_FREE_DISK_MIB` are free.
    """
    free = shutil.disk_usage(directory).free // _MIB
    if free < MIN_FREE_DISK_MIB:
        raise Exhausted(
            f"{free} MiB are free on the disk of {directory}, a box needs {MIN_FREE_DISK_MIB}; "
            "free space or set VOIDBOX_STATE_DIR",
            reason="DISK_FULL",
            path=directory,
        )
