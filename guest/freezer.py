"""Stops all programs at one point, for the machine to be saved, and lets them go on. Blocks."""

from __future__ import annotations

import os
import select
import time

from guest.errors import AgentError, Code, wrong_state

# A process in the middle of reading from a slow disk stops when that is done.
SECONDS = 10.0


def set_frozen(base: str, frozen: bool) -> None:
    """Freeze or thaw every program below the cgroup `base`; returns once the kernel says so.

    Raises:
        AgentError: there are no cgroups, or a program does not stop; all go on then.
    """
    try:
        events = os.open(f"{base}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise wrong_state(
            f"programs cannot be frozen without cgroups: {error.strerror}", reason="NO_CGROUPS"
        ) from error
    try:
        _write(base, frozen)
        deadline = time.monotonic() + SECONDS
        changed = select.poll()
        changed.register(events, select.POLLPRI)
        # Reading arms the notification, so no change is missed.
        while (b"\nfrozen 1" in b"\n" + os.pread(events, 4096, 0)) != frozen:
            left = deadline - time.monotonic()
            if left <= 0:
                _write(base, False)
                raise AgentError(
                    Code.UNAVAILABLE, "NOT_FROZEN", f"a program could not be stopped within {SECONDS:g} s"
                )
            changed.poll(left * 1000)
    finally:
        os.close(events)


def _write(base: str, frozen: bool) -> None:
    with open(f"{base}/cgroup.freeze", "w") as file:
        file.write(str(int(frozen)))
