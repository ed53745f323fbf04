"""How much of the network a box may use: connections, new ones per second, bytes per second and in total."""

from __future__ import annotations

import asyncio
import time

from services.common.egress.policy import Limits


class Bucket:
    """Tokens that come back at `rate` per second, up to `size`; rate 0 never runs out."""

    def __init__(self, rate: float, size: float) -> None:
        self._rate = rate
        self._size = size
        self._tokens = size
        self._at = time.monotonic()

    def take(self, count: float) -> float:
        """Take tokens, also those that are not there yet; how many seconds they are still to come."""
        if not self._rate:
            return 0.0
        now = time.monotonic()
        self._tokens = min(self._size, self._tokens + (now - self._at) * self._rate) - count
        self._at = now
        return max(0.0, -self._tokens / self._rate)

    def has(self, count: float) -> bool:
        """Take tokens if all of them are there."""
        if not self._rate:
            return True
        if self.take(0) or self._tokens < count:
            return False
        self._tokens -= count
        return True


class Meter:
    """What a box has used so far, against its limits."""

    def __init__(self, limits: Limits, used: int = 0) -> None:
        self._limits = limits
        self.open = 0
        self.bytes = used
        self._new = Bucket(limits.new_per_second, max(1.0, float(limits.new_per_second)))
        self._rate = Bucket(limits.bytes_per_second, max(65536.0, float(limits.bytes_per_second)))

    def refusal(self) -> str:
        """Why no further connection may be made now; empty if one may, which is then counted as new."""
        limits = self._limits
        if self.exhausted:
            return f"the box has used all of its {limits.total_bytes} bytes (limits.total_bytes)"
        if limits.connections and self.open >= limits.connections:
            return f"{self.open} connections are open (limits.connections)"
        if not self._new.has(1):
            return f"more than {limits.new_per_second} new connections in a second (limits.new_per_second)"
        return ""

    @property
    def exhausted(self) -> bool:
        """Whether the bytes of the box's whole life are used up."""
        return bool(self._limits.total_bytes) and self.bytes >= self._limits.total_bytes

    async def used(self, count: int) -> None:
        """Count bytes of either direction; waits where the box is faster than it may be.

        Raises:
            QuotaExhausted: these were the last.
        """
        self.bytes += count
        if self.exhausted:
            raise QuotaExhausted
        if seconds := self._rate.take(count):
            await asyncio.sleep(seconds)


class QuotaExhausted(Exception):
    """The box has used all the bytes that it may."""
