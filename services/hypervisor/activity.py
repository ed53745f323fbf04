"""When a box is idle: nobody calls it, and its machine does next to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# An idle machine takes 0.01 to 0.03 processors under emulation, less under KVM; a program that does
# anything to speak of takes more than this.
BUSY_PROCESSORS = 0.05


class Activity:
    """Knows what uses a box.

    A call that is open is use: a program that somebody is attached to, a file being copied, a forwarded
    connection. So is processor time: what nobody is attached to counts for as long as it works, not
    while it waits for somebody to connect.

    Args:
        cpu_seconds: The processor time that the machine has used so far.
    """

    def __init__(self, cpu_seconds: Callable[[], float]) -> None:
        self._cpu_seconds = cpu_seconds
        self._limits: list[_Limit] = []
        self.calls = 0

    def limit(self, seconds: float, expired: Callable[[], object]) -> None:
        """Have `expired` called whenever the box has been idle for `seconds`; 0 means never."""
        if seconds:
            self._limits.append(_Limit(self, seconds, expired))

    def clear(self) -> None:
        """Forget all limits."""
        self.halt()
        self._limits.clear()

    def begin(self) -> None:
        """Note that a call has come."""
        self.calls += 1
        self.halt()

    def end(self) -> None:
        """Note that a call has ended."""
        self.calls -= 1
        self.rest()

    def rest(self) -> None:
        """Wait for the limits, unless there are calls."""
        if self.calls == 0:
            for limit in self._limits:
                limit.start()

    def halt(self) -> None:
        """Wait no more."""
        for limit in self._limits:
            limit.stop()

    def used(self) -> float:
        """Processor time of the machine so far."""
        return self._cpu_seconds()


class _Limit:
    def __init__(self, activity: Activity, seconds: float, expired: Callable[[], object]) -> None:
        self._activity = activity
        self._seconds = seconds
        self._expired = expired
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._timer is None:
            used = self._activity.used()
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._over, used)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _over(self, used: float) -> None:
        self._timer = None
        if self._activity.used() - used > self._seconds * BUSY_PROCESSORS:
            self.start()
        else:
            self._expired()
