"""One cgroup per program, so that a program's whole process tree can be named and killed.

A double fork, a new session, a daemon: nothing leaves a cgroup. Where the host of a test
has no cgroup v2 the tree is found by session and parent instead; that misses a daemon
whose parents have all ended, so a guest always has cgroups.
"""

from __future__ import annotations

import contextlib
import os
import signal

from guest import log


def prepare(base: str) -> bool:
    """Make the parent of all programs' cgroups; False if cgroup v2 is not there.

    The `pids` limit leaves the agent and PID 1 room to fork whatever programs do, and the
    `cpu` controller makes all programs together count as much as the agent alone: eight
    hundred processes of a fork bomb would otherwise keep it from killing them.
    """
    if not base:
        return False
    try:
        os.makedirs(base, exist_ok=True)
        if not os.path.exists(f"{base}/cgroup.procs"):
            raise FileNotFoundError(2, "not a cgroup v2 directory", base)
    except OSError as error:
        log.warning(f"no cgroups, programs are tracked by session: {error}")
        return False
    for directory in (os.path.dirname(base), base):
        for controller in ("cpu", "memory", "pids"):
            # Each on its own: one that the kernel lacks must not cost the other.
            with contextlib.suppress(OSError):
                write(f"{directory}/cgroup.subtree_control", f"+{controller}")
    with contextlib.suppress(OSError):
        threads = int(_read("/proc/sys/kernel/threads-max"))
        write(f"{base}/pids.max", str(max(64, threads * 3 // 4)))
    return True


def limit(base: str, files: dict[str, str]) -> None:
    """Put limits on all programs together: names of the cgroup's files and what to write there.

    Raises:
        OSError: there are no cgroups, or the kernel lacks the controller.
    """
    if files and not base:
        raise FileNotFoundError(2, "this machine has no cgroup v2 for programs", "/sys/fs/cgroup")
    for name, text in files.items():
        write(f"{base}/{name}", text)


def create(base: str, name: str) -> str:
    """Make the cgroup of program `name` and return its directory."""
    directory = f"{base}/exec-{name}"
    try:
        os.mkdir(directory)
    except FileExistsError:
        # Daemons of an earlier program with this id still live in it.
        kill(directory)
        directory = f"{directory}-{os.urandom(4).hex()}"
        os.mkdir(directory)
    return directory


def join(directory: str) -> None:
    """Move the calling process into the cgroup."""
    write(f"{directory}/cgroup.procs", "0")


def remove(directory: str) -> bool:
    """Remove the cgroup; False while processes live in it."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def members(directory: str) -> list[int]:
    """The processes in the cgroup."""
    try:
        return [int(line) for line in _read(f"{directory}/cgroup.procs").split()]
    except OSError:
        return []


def terminate(directory: str) -> None:
    """Send TERM to every process of the cgroup."""
    for pid in members(directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def kill(directory: str) -> None:
    """Kill every process of the cgroup, also those that are forking right now."""
    try:
        write(f"{directory}/cgroup.kill", "1")  # Linux 5.14
        return
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning(f"cannot kill {directory}: {error}")
    with contextlib.suppress(OSError):
        write(f"{directory}/cgroup.freeze", "1")
    for _ in range(16):  # a fork bomb may outrun one pass where freezing is not possible
        pids = members(directory)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            break
    with contextlib.suppress(OSError):
        write(f"{directory}/cgroup.freeze", "0")


def out_of_memory(directory: str) -> bool:
    """Whether the kernel has killed a process of the cgroup for lack of memory."""
    try:
        for line in _read(f"{directory}/memory.events").splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value) > 0
    except OSError:
        pass
    return False


def descendants(leader: int) -> list[int]:
    """All processes below `leader` or in its session, by /proc: the way without cgroups."""
    parents: dict[int, int] = {}
    found = {leader}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            fields = _read(f"/proc/{name}/stat").rpartition(")")[2].split()
        except OSError:
            continue
        pid, parent, session = int(name), int(fields[1]), int(fields[3])
        parents[pid] = parent
        if session == leader:
            found.add(pid)
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return sorted(found)


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 20).decode()
    finally:
        os.close(fd)


def write(path: str, text: str) -> None:
    """Write to a file of a cgroup."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
