"""What a process takes of the host, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Processor time in seconds; memory, and what went from and to disks, in bytes."""

    cpu_seconds: float = 0.0
    resident: int = 0
    proportional: int = 0
    private: int = 0
    swapped: int = 0
    disk_read: int = 0
    disk_written: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            **{name: getattr(self, name) + getattr(other, name) for name in Usage.__dataclass_fields__}
        )


def of(pids: Iterable[int]) -> Usage:
    """The sum over `pids`; processes that are gone count nothing."""
    return sum((_one(pid) for pid in pids if pid > 0), Usage())


def cpu_seconds(pid: int) -> float:
    """The processor time that a process has used; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        # utime and stime: fields 14 and 15 of proc_pid_stat(5), the third being the first here.
        return (int(fields[11]) + int(fields[12])) / _TICKS
    except (OSError, IndexError):
        return 0.0


def _one(pid: int) -> Usage:
    base = Path(f"/proc/{pid}")
    if not base.exists():
        return Usage()
    cpu = cpu_seconds(pid)
    read, written = _disk_bytes(base)
    try:
        rollup = _fields((base / "smaps_rollup").read_text())
    except OSError:  # a process that confines itself may hide its mappings
        resident = resident_bytes(pid)
        return Usage(
            cpu_seconds=cpu,
            resident=resident,
            proportional=resident,
            private=resident,
            disk_read=read,
            disk_written=written,
        )
    return Usage(
        cpu_seconds=cpu,
        swapped=rollup.get("SwapPss", rollup.get("Swap", 0)),
        disk_read=read,
        disk_written=written,
        resident=rollup.get("Rss", 0),
        proportional=rollup.get("Pss", 0),
        private=rollup.get("Private_Clean", 0) + rollup.get("Private_Dirty", 0),
    )


def _disk_bytes(base: Path) -> tuple[int, int]:
    """What a process had to read from and write to disks: proc_pid_io(5); 0 where that is not allowed."""
    try:
        lines = (base / "io").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
    return found.get("read_bytes", 0), max(0, found.get("write_bytes", 0))


def _fields(text: str) -> dict[str, int]:
    found = {}
    for line in text.splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return found


def resident_bytes(pid: int) -> int:
    """Resident memory of one process; cheap; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0
