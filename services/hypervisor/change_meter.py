"""Stops boxes that change more of their overlays than they may."""

from __future__ import annotations

import asyncio
import logging
import time

from services.common.errors import VoidboxError
from services.hypervisor.box import Box
from services.hypervisor.changes import ChangeStore, overlays

log = logging.getLogger(__name__)

# No file system here tells when a directory has grown, and only root can give one a quota. A box writes
# some 100 MB/s at most, which is what it may exceed its limit by.
_SECONDS = 1.0
# Measuring takes a twentieth of the time at most.
_REST = 20


class ChangeMeter:
    """Measures the changes of the boxes that run."""

    def __init__(self, changes: ChangeStore) -> None:
        self._changes = changes
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, box: Box) -> None:
        """Measure the changes of a box to its end, if it has overlays."""
        if overlays(box.record.config):
            task = asyncio.create_task(self._follow(box), name=f"changes {box.id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _follow(self, box: Box) -> None:
        pause = _SECONDS
        while True:
            try:
                async with asyncio.timeout(pause):
                    await box.ended.wait()
                return
            except TimeoutError:
                pass
            began = time.monotonic()
            try:
                used = await asyncio.to_thread(self._changes.used_bytes, box.id)
                too_much = used > self._changes.limit_bytes
                what = f"take more than {self._changes.limit_bytes >> 20} MiB (changes_mib of the hypervisor)"
            except OSError as error:
                too_much, what = True, f"cannot be measured: {error.strerror}"
            if too_much:
                paths = ", ".join(each.guest_path for each in overlays(box.record.config))
                try:
                    await box.stop(0, f"its changes of {paths} {what}")
                except VoidboxError as error:
                    log.error("box %s changes too much and cannot be stopped: %s", box.id, error)
                return
            pause = max(_SECONDS, _REST * (time.monotonic() - began))

    async def close(self) -> None:
        """Stop measuring; the boxes go on."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
