"""Processes that may have ended since they were written down: a pid and when it started.

Linux only: it reads /proc/<pid>/stat (proc_pid_stat(5)).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One process, not to be confused with a later one that got the same pid."""

    pid: int
    # Clock ticks between the boot of the host and the start of the process.
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """The process that has `pid` now, or None; a zombie counts as gone."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The name in parentheses may hold anything; fields are counted after it.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else cls(pid=pid, start_ticks=int(fields[19]))

    @classmethod
    def parse(cls, entry: object) -> Identity | None:
        """The identity that `to_json` wrote, or None if it is malformed."""
        if not isinstance(entry, Mapping):
            return None
        pid, ticks = entry.get("pid"), entry.get("start_ticks")
        return cls(pid=pid, start_ticks=ticks) if isinstance(pid, int) and isinstance(ticks, int) else None

    def to_json(self) -> dict[str, Any]:
        """The form for the record."""
        return {"pid": self.pid, "start_ticks": self.start_ticks}

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.pid > 0 and Identity.of(self.pid) == self

    def end(self, term_seconds: float, kill_seconds: float = 5.0) -> bool:
        """TERM, then KILL; returns whether it is gone. The process need not be our child."""
        for number, seconds in ((signal.SIGTERM, term_seconds), (signal.SIGKILL, kill_seconds)):
            if seconds > 0 and self._signal_and_wait(number, seconds):
                return True
        return not self.alive

    def ask_to_end(self) -> None:
        """Send TERM and do not wait."""
        self._signal_and_wait(signal.SIGTERM, 0)

    def wait(self, seconds: float) -> bool:
        """Wait for its end; returns whether it is gone."""
        return self._signal_and_wait(None, seconds)

    def _signal_and_wait(self, number: int | None, seconds: float) -> bool:
        try:
            # The pidfd is opened before the identity is checked, so it is that process's.
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            if not self.alive:
                return True
            if number is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, number)
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            poller.poll(seconds * 1000)
            return not self.alive
        finally:
            os.close(pidfd)
