"""What the guest uses, read from /proc and /sys. Blocks for some milliseconds."""

from __future__ import annotations

import os
from typing import NamedTuple

_TICK_NS = 10**9 // os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SECTOR = 512  # the unit of /proc/diskstats whatever the device says
_KTHREADD = 2


class Process(NamedTuple):
    """What one process uses."""

    pid: int
    name: str
    memory: int
    cpu_ns: int
    exec_id: str


class Sample(NamedTuple):
    """What the guest uses at one moment; bytes and nanoseconds."""

    cpu_ns: int
    memory_total: int
    memory_available: int
    received: int
    sent: int
    read: int
    written: int
    process_count: int
    agent_memory: int
    processes: list[Process]


def sample(*, agents: tuple[int, ...], each: bool) -> Sample:
    """Measure now.

    Args:
        agents: The pids of PID 1 and the agent.
        each: Whether each process is listed too.
    """
    memory = _memory()
    received, sent = _network()
    read, written = _disks()
    processes = [one for pid in _pids() if (one := _process(pid, each=each)) is not None]
    return Sample(
        cpu_ns=_cpu(),
        memory_total=memory["MemTotal"],
        memory_available=memory.get("MemAvailable", memory["MemFree"]),
        received=received,
        sent=sent,
        read=read,
        written=written,
        process_count=len(processes),
        agent_memory=sum(one.memory for one in processes if one.pid in agents),
        processes=processes if each else [],
    )


def _cpu() -> int:
    fields = [int(word) for word in _text("/proc/stat").split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) * _TICK_NS  # all but idle and iowait


def _memory() -> dict[str, int]:
    found = {}
    for line in _text("/proc/meminfo").splitlines()[:4]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return found


def _network() -> tuple[int, int]:
    received = sent = 0
    for line in _text("/proc/net/dev").splitlines()[2:]:
        name, _, rest = line.partition(":")
        words = rest.split()
        if name.strip() != "lo":
            received += int(words[0])
            sent += int(words[8])
    return received, sent


def _disks() -> tuple[int, int]:
    read = written = 0
    try:
        disks = set(os.listdir("/sys/block"))
        lines = _text("/proc/diskstats").splitlines()
    except OSError:
        return 0, 0
    for line in lines:
        words = line.split()
        if words[2] in disks and not words[2].startswith(("loop", "ram", "dm-")):
            read += int(words[5]) * _SECTOR
            written += int(words[9]) * _SECTOR
    return read, written


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _process(pid: int, *, each: bool) -> Process | None:
    """One process; None for a kernel thread or one that has ended."""
    try:
        head, _, rest = _text(f"/proc/{pid}/stat").rpartition(")")
        words = rest.split()
        if pid == _KTHREADD and os.stat(f"/proc/{pid}").st_uid == 0 and words[20] == "0":
            return None
        if int(words[1]) == _KTHREADD and words[20] == "0":  # no memory: a kernel thread
            return None
        exec_id = _exec_id(pid) if each else ""
    except OSError:
        return None
    name = head.partition("(")[2]
    cpu = (int(words[11]) + int(words[12])) * _TICK_NS
    return Process(pid, name, int(words[21]) * _PAGE, cpu, exec_id)


def _exec_id(pid: int) -> str:
    for line in _text(f"/proc/{pid}/cgroup").splitlines():
        hierarchy, _, path = line.partition("::")
        name = path.rpartition("/")[2]
        if hierarchy == "0" and name.startswith("exec-"):
            return name.removeprefix("exec-")
    return ""


def _text(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts).decode(errors="replace")
    finally:
        os.close(fd)
