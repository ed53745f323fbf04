"""How long a peer has been away, and when to try again."""

from __future__ import annotations

import asyncio

from services.common.errors import VoidboxError

# A service that died is back within a few seconds (voidbox.stack.service).
RECONNECT_SECONDS = 20.0
FIRST_DELAY_SECONDS = 0.05
MAX_DELAY_SECONDS = 1.0


class Outage:
    """Attempts to reach one peer again.

    Args:
        seconds: After this long without an answer the error is raised.
    """

    def __init__(self, seconds: float = RECONNECT_SECONDS) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self._delay = FIRST_DELAY_SECONDS

    def over(self) -> None:
        """The peer answered."""
        self._since = None

    async def wait(self, error: VoidboxError) -> None:
        """Wait a moment, longer each time; raises `error` once the outage has lasted too long."""
        now = asyncio.get_running_loop().time()
        if self._since is None:
            self._since, self._delay = now, FIRST_DELAY_SECONDS
        if now - self._since > self._seconds:
            raise error
        await asyncio.sleep(self._delay)
        self._delay = min(MAX_DELAY_SECONDS, self._delay * 2)
