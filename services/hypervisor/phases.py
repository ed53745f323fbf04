"""How long each part of a start took."""

from __future__ import annotations

import time

from services.hypervisor.model import Phase


class Phases:
    """Measures the phases of a start, one after the other."""

    def __init__(self) -> None:
        self.done: tuple[Phase, ...] = ()
        self._last = time.monotonic()

    def add(self, name: str) -> None:
        """End the present phase, which is called `name`."""
        now = time.monotonic()
        self.done = (*self.done, Phase(name=name, seconds=now - self._last))
        self._last = now
