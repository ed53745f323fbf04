"""Processes by pidfd: watched without polling, signalled without hitting a reused pid.

A pid together with the process's start time names a process for good, so a restarted service
can take up what its predecessor started (pidfd_open(2), proc_pid_stat(5)).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import time
from pathlib import Path

from services.common.errors import NotFound


def start_time(pid: int) -> int | None:
    """The process's start in clock ticks since boot; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may itself hold spaces and parentheses. Field 22, counted after it.
    fields = text.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def host_boot_id() -> str:
    """Tells one boot of the host from another; pids mean nothing across it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def children(pid: int) -> list[int]:
    """The direct children of a process; empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for word in text.split()]


class Process:
    """A process that is watched by pidfd; `close` ends the watch, never the process."""

    def __init__(self, pid: int, started: int) -> None:
        self.pid = pid
        self.started = started
        self._fd = -1
        self._ended = asyncio.Event()

    @classmethod
    def watch(cls, pid: int, started: int | None = None) -> Process:
        """Watch `pid`; with `started`, only if it is still that same process.

        Raises:
            NotFound: it is gone, or the pid is another process's by now.
        """
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise NotFound(f"process {pid} is gone", reason="PROCESS_GONE") from None
        present = start_time(pid)
        if present is None or (started is not None and present != started):
            os.close(fd)
            raise NotFound(f"process {pid} is gone", reason="PROCESS_GONE")
        process = cls(pid, present)
        process._fd = fd
        asyncio.get_running_loop().add_reader(fd, process._on_end)
        return process

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        self._reap()
        self._ended.set()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):  # adopted: its parent is another process
            os.waitpid(self.pid, os.WNOHANG)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return not self._ended.is_set()

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end, at most `seconds`; whether it has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        return self._ended.is_set()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if it has ended."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def kill_group(self) -> None:
        """Kill its process group, which it leads; nothing happens if it has ended.

        The group id cannot have been reused while the leader is not reaped, and we reap it.
        """
        if self.alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.send(signal.SIGKILL)

    def close(self) -> None:
        """End the watch. Idempotent."""
        if self._fd >= 0:
            with contextlib.suppress(RuntimeError):  # the loop may be closed already
                asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


def kill_now(pid: int, started: int, seconds: float = 5.0) -> bool:
    """Kill the process group led by `pid` if it is still that process; whether it and its children are gone.

    Synchronous: for clean-up without an event loop.
    """
    if start_time(pid) != started:
        return True
    with contextlib.ExitStack() as stack:
        watched = []
        for member in (pid, *children(pid)):
            with contextlib.suppress(ProcessLookupError):
                watched.append(os.pidfd_open(member))
                stack.callback(os.close, watched[-1])
        if start_time(pid) != started:
            return True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        for fd in watched:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        deadline = time.monotonic() + seconds
        gone = all(_ends_by(fd, deadline) for fd in watched)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        return gone


def _ends_by(pidfd: int, deadline: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
