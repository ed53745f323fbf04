"""Room in memory for a lower limit of the programs."""

from __future__ import annotations

import contextlib

from guest.cgroups import write
from guest.errors import wrong_state

_ATTEMPTS = 4  # what is reclaimed may be needed again at once


def make_room(base: str, limit: int) -> None:
    """See that the programs have no more than `limit` bytes of memory in use: caches give way. Blocks.

    Raises:
        AgentError: they have; a limit below that would kill some of them.
    """
    if not limit or not base:
        return
    for _ in range(_ATTEMPTS):
        with open(f"{base}/memory.current") as file:
            used = int(file.read())
        if used <= limit:
            return
        with contextlib.suppress(OSError):
            write(f"{base}/memory.reclaim", str(used - limit))  # Linux 5.19
    raise wrong_state(
        f"the programs use {used >> 20} MiB, more than the limit of {limit >> 20} MiB; end some first",
        reason="MEMORY_IN_USE",
    )
