"""An epoll loop for one process: descriptors, a few named timers, and work at the end of each turn."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

Handler = Callable[[int], None]
"""Called with the epoll events of its descriptor."""

IN = select.EPOLLIN
OUT = select.EPOLLOUT
HANG_UP = select.EPOLLHUP | select.EPOLLERR
READ_HANG_UP = select.EPOLLRDHUP
EDGE = select.EPOLLET
"""Every descriptor is watched for edges unless its handler always takes all there is: a side that
is closed, or waits for the other, then costs nothing."""


class Loop:
    """Not reentrant; `run` returns after `stop`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._turns: list[Callable[[], bool]] = []
        self._closing: list[int] = []
        self._running = True
        self.events = 0
        """How many events have been handled."""

    def add(self, fd: int, events: int, handler: Handler) -> None:
        """Watch `fd`.

        Raises:
            PermissionError: it cannot be polled (a regular file).
        """
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def change(self, fd: int, events: int) -> None:
        """Watch `fd` for `events` from now on; what is true already is reported once more."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Stop watching `fd`, and leave it open."""
        if self._handlers.pop(fd, None):
            self._epoll.unregister(fd)

    def close(self, fd: int) -> None:
        """Stop watching `fd` and close it at the end of the turn.

        Not now: events of this turn that are still to be handled would meet whatever is opened
        under the same number.
        """
        self.remove(fd)
        self._closing.append(fd)

    def at_turn_end(self, work: Callable[[], bool]) -> None:
        """Call `work` at the end of every turn; True asks for another turn without waiting."""
        self._turns.append(work)

    def set_timer(self, name: str, at: float, action: Callable[[], None]) -> None:
        """Call `action` once at `time.monotonic()` >= `at`; replaces the timer of the same name."""
        self._timers[name] = (at, action)

    def clear_timer(self, name: str) -> None:
        """Forget the timer, if there is one."""
        self._timers.pop(name, None)

    def retire(self, keep: set[int]) -> None:
        """Forget every descriptor but `keep`, every timer and all work; nothing is closed."""
        for fd in self._handlers.keys() - keep:
            self.remove(fd)
        self._timers.clear()
        self._turns.clear()

    def stop(self) -> None:
        """Make `run` return at the end of this turn."""
        self._running = False

    def run(self) -> None:
        """Turn until stopped."""
        busy = False
        while self._running:
            busy = self.turn(0 if busy else None)

    def turn(self, wait: float | None = None) -> bool:
        """Wait for events (at most `wait` seconds) and handle them; True if there is more to do."""
        if self._timers:
            until = min(at for at, _ in self._timers.values()) - time.monotonic()
            wait = max(0.0, until) if wait is None else min(wait, max(0.0, until))
        for fd, events in self._epoll.poll(wait):
            handler = self._handlers.get(fd)
            if handler is not None:
                self.events += 1
                handler(events)
        if self._timers:
            now = time.monotonic()
            for name, (at, action) in list(self._timers.items()):
                if at <= now and self._timers.get(name) == (at, action):
                    del self._timers[name]
                    action()
        busy = False
        for work in self._turns:
            busy |= work()
        closing, self._closing = self._closing, []
        for fd in closing:
            os.close(fd)
        return busy
