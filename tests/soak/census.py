"""Counts everything of the host that a service and its boxes can leave behind.

What belongs to them is told by their private directory: a process that has it in its environment
or command line, or has a file in it open; a socket or mount in it; a file below it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20
# What closes a connection or ends a process learns of its end later than who has asked for it.
_SETTLE_SECONDS = 30.0
PROC = Path("/proc")
# Grow with what is told, not with what is held; their number counts, their length does not.
_LOGS = ".log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What there is at one moment. All but the memory are numbers of things."""

    processes: int
    descriptors: int
    threads: int
    files: int
    file_mib: float
    sockets: int
    mounts: int
    namespaces: int
    locks: int
    memory_mib: dict[str, float]
    opened: tuple[str, ...] = dataclasses.field(repr=False, default=())
    """Where the services' descriptors lead, as evidence."""


COUNTED = tuple(
    field.name
    for field in dataclasses.fields(Census)
    if field.name not in ("memory_mib", "threads", "file_mib", "opened")
)
"""What must be the same before and after. Threads are pooled, and a database's file has slack."""


def processes_of(directory: Path, but: Iterable[int] = ()) -> list[int]:
    """Processes that belong to whoever lives in `directory`, lowest pid first."""
    left_out = {os.getpid(), *but}
    pids = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal())
    return sorted(pid for pid in pids if pid not in left_out and _belongs(pid, str(directory)))


def holding(directory: Path) -> list[int]:
    """Processes that have something below `directory` open, or run there, lowest pid first."""
    pids = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal())
    return sorted(pid for pid in pids if pid != os.getpid() and held(pid, directory))


def held(pid: int, directory: Path) -> list[str]:
    """What a process has open below `directory`, or whether it runs there."""
    return [link for link in _links(pid) if link.startswith(str(directory))]


def _belongs(pid: int, mark: str) -> bool:
    base = PROC / str(pid)
    with contextlib.suppress(OSError):
        raw = mark.encode()
        if raw in (base / "environ").read_bytes() or raw in (base / "cmdline").read_bytes():
            return True
    return any(link.startswith(mark) for link in _links(pid))


def _opened(pid: int) -> list[str]:
    """Where its descriptors lead."""
    return _read_links(PROC / str(pid) / "fd")


def _links(pid: int) -> list[str]:
    """Where its descriptors, its directory and its root lead."""
    found = _opened(pid)
    for name in ("cwd", "root"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(PROC / str(pid) / name))
    return found


def _read_links(directory: Path) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):
                found.append(os.readlink(directory / name))
    return found


def _namespaces(pid: int) -> set[str]:
    found = set(_read_links(PROC / str(pid) / "ns"))
    # Held by a descriptor alone, e.g. `net:[4026532011]`.
    found |= {link for link in _links(pid) if link.partition(":")[0] in ("net", "mnt", "user", "pid", "ipc")}
    return found


def memory_mib(pid: int) -> float:
    """Memory that only this process has; what it shares with others is theirs as well."""
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _files(directory: Path) -> tuple[int, int]:
    count = size = 0
    for root, names, files in os.walk(directory):
        count += len(names) + len(files)
        for name in files:
            if not name.endswith(_LOGS):
                with contextlib.suppress(OSError):
                    size += os.lstat(os.path.join(root, name)).st_blocks * 512
    return count, size


def _lines(path: Path, mark: str) -> int:
    with contextlib.suppress(OSError):
        return sum(mark in line for line in path.read_text(errors="replace").splitlines())
    return 0


def take(directory: Path, services: dict[str, int]) -> Census:
    """Count now.

    Args:
        directory: The private directory of the services.
        services: Their pids by name; descriptors, threads and memory are theirs.
    """
    mark = str(directory)
    pids = processes_of(directory)
    count, size = _files(directory)
    namespaces: set[str] = set()
    for pid in pids:
        namespaces |= _namespaces(pid)
    ours = {str(pid) for pid in pids}
    opened = tuple(sorted(link for pid in services.values() for link in _opened(pid)))
    locks = [line.split() for line in (PROC / "locks").read_text().splitlines()]
    return Census(
        processes=len(pids),
        descriptors=len(opened),
        opened=opened,
        threads=sum(len(os.listdir(PROC / str(pid) / "task")) for pid in services.values()),
        files=count,
        file_mib=size / _MIB,
        sockets=_lines(PROC / "net/unix", mark),
        mounts=sum(_lines(PROC / str(pid) / "mountinfo", mark) for pid in services.values()),
        namespaces=len(namespaces),
        locks=sum(any(word in ours for word in words[4:6]) for words in locks),
        memory_mib={name: memory_mib(pid) for name, pid in services.items()},
    )


def grown(before: Census, after: Census) -> dict[str, tuple[int, int]]:
    """What there is more of: name to (before, after)."""
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in COUNTED}
    return {name: pair for name, pair in pairs.items() if pair[1] > pair[0]}


async def settled(directory: Path, services: dict[str, int], before: Census | None) -> Census:
    """The count once nothing is more than `before`, or after 30 s with what is too much."""
    gc.collect()  # connections of our own that only wait for that
    found = await asyncio.to_thread(take, directory, services)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _SETTLE_SECONDS
    while before is not None and grown(before, found) and loop.time() < deadline:
        await asyncio.sleep(1.0)
        found = await asyncio.to_thread(take, directory, services)
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """By how much y grows with x: the median of the slopes between all pairs (Theil and Sen).

    One reading that is off does not move it, as it would a least-squares line.
    """
    slopes = sorted(
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for number, later in enumerate(points)
        for earlier in points[:number]
        if later[0] != earlier[0]
    )
    middle = len(slopes) // 2
    if not slopes:
        return 0.0
    return slopes[middle] if len(slopes) % 2 else (slopes[middle - 1] + slopes[middle]) / 2
