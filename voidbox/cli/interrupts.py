"""SIGINT and SIGTERM as something to wait for: the first asks to stop, the next to leave at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from voidbox.cli.exitcode import ExitCode

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal arrived while nothing was under way that had to be stopped in order."""


class Interrupts:
    """Counts the signals that arrive inside its block."""

    def __init__(self) -> None:
        self.count = 0
        self._last = 0
        self._arrived = asyncio.Event()

    @property
    def exit_code(self) -> int:
        """What a process ended by the last signal exits with."""
        return 128 + self._last

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        self.count += 1
        self._last = number
        self._arrived.set()

    async def next(self) -> int:
        """Wait for the next signal; returns its number."""
        await self._arrived.wait()
        self._arrived.clear()
        return self._last

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which the first signal cancels.

        Raises:
            Interrupted: a signal arrived first.
        """
        task = asyncio.create_task(work)
        arrival = asyncio.create_task(self.next())
        try:
            await asyncio.wait((task, arrival), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Interrupted
        finally:
            for one in (task, arrival):
                one.cancel()
            await asyncio.gather(task, arrival, return_exceptions=True)


async def until_interrupted(work: Coroutine[Any, Any, object]) -> int:
    """Do `work`; the exit code of a command that the first signal ends."""
    with Interrupts() as interrupts:
        try:
            await interrupts.guard(work)
        except Interrupted:
            return interrupts.exit_code
    return ExitCode.OK
