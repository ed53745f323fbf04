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
    """Processor time in seconds and memory in bytes."""

    cpu_seconds: float = 0.0
    resident: int = 0
    proportional: int = 0
    private: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            cpu_seconds=self.cpu_seconds + other.cpu_seconds,
            resident=self.resident + other.resident,
            proportional=self.proportional + other.proportional,
            private=self.private + other.private,
        )


def of(pids: Iterable[int]) -> Usage:
    """The sum over `pids`; processes that are gone count nothing."""
    return sum((_one(pid) for pid in pids if pid > 0), Usage())


def _one(pid: int) -> Usage:
    base = Path(f"/proc/{pid}")
    try:
        fields = (base / "stat").read_bytes().rpartition(b")")[2].split()
        # utime and stime: fields 14 and 15 of proc_pid_stat(5), the third being the first here.
        cpu = (int(fields[11]) + int(fields[12])) / _TICKS
    except (OSError, IndexError):
        return Usage()
    try:
        rollup = _fields((base / "smaps_rollup").read_text())
    except OSError:  # a process that confines itself may hide its mappings
        resident = resident_bytes(pid)
        return Usage(cpu_seconds=cpu, resident=resident, proportional=resident, private=resident)
    return Usage(
        cpu_seconds=cpu,
        resident=rollup.get("Rss", 0),
        proportional=rollup.get("Pss", 0),
        private=rollup.get("Private_Clean", 0) + rollup.get("Private_Dirty", 0),
    )


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
