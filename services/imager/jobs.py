"""Runs blocking work in threads: its progress as a stream, its end tied to the caller's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Self, TypeVar

from services.imager.limits import Cancel
from services.imager.progress import Progress, Report

# Reports of one subject come at most this often, except its first and last.
REPORT_SECONDS: Final = 0.1
_LONG_THREADS: Final = 16  # pulls and builds at once; more wait
_SHORT_THREADS: Final = 8  # look-ups, which must not wait for pulls

Result = TypeVar("Result")


class Jobs:
    """The threads of one imager; a context manager that cancels and awaits what still runs."""

    def __init__(self) -> None:
        self._long = ThreadPoolExecutor(_LONG_THREADS, "imager-long")
        self._short = ThreadPoolExecutor(_SHORT_THREADS, "imager-short")
        self._running: set[Cancel] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for cancel in list(self._running):
            cancel.cancel()
        for pool in (self._long, self._short):
            await asyncio.to_thread(pool.shutdown)

    async def run(self, work: Callable[[Cancel], Result]) -> Result:
        """The result of `work`, which is short, in a thread; cancelling the task cancels the work."""
        return await self._run(self._short, work)

    async def run_long(self, work: Callable[[Cancel], Result]) -> Result:
        """The result of `work`, which takes its time, as `run`."""
        return await self._run(self._long, work)

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[Cancel], Result]) -> Result:
        cancel = Cancel()
        self._running.add(cancel)
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work, cancel)
        finally:
            cancel.cancel()
            self._running.discard(cancel)

    async def stream(
        self, work: Callable[[Report, Cancel], Result]
    ) -> AsyncGenerator[Progress | Result, None]:
        """The progress that `work` reports, then its result as the last item."""
        queue: asyncio.Queue[Progress | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        reports = _Throttle(lambda item: loop.call_soon_threadsafe(queue.put_nowait, item))
        task = asyncio.ensure_future(self._run(self._long, lambda cancel: work(reports, cancel)))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (item := await queue.get()) is not None:
                yield item
            yield task.result()
        finally:
            task.cancel()


class _Throttle:
    """A `Report` for many threads that drops what comes too fast."""

    def __init__(self, send: Callable[[Progress], object]) -> None:
        self._send = send
        self._last: dict[tuple[str, str], float] = {}

    def __call__(self, progress: Progress) -> None:
        key = (progress.subject, progress.action)
        now = time.monotonic()
        complete = progress.total > 0 and progress.done >= progress.total
        if not complete and now - self._last.get(key, float("-inf")) < REPORT_SECONDS:
            return
        self._last[key] = now
        self._send(progress)
