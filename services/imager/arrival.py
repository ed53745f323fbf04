"""A layer's blob that is read while it arrives: who brings it and who reads it are two threads."""

from __future__ import annotations

import enum
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, Final, Self

from services.common.errors import Cancelled
from services.imager.cache import ImageCache
from services.imager.limits import Cancel

_CHUNK: Final = 1 << 20


class _State(enum.Enum):
    AWAITED = enum.auto()
    ARRIVING = enum.auto()
    WHOLE = enum.auto()  # in the cache under its name
    LOST = enum.auto()  # what was read may not be what comes in the end


class Arrival:
    """What is known of one blob that is being brought into the cache.

    Args:
        size: Its length, which never is exceeded.
        cancel: Ends the reader's waiting.
    """

    def __init__(self, cache: ImageCache, digest: str, size: int, cancel: Cancel) -> None:
        self._cache, self._digest, self._cancel = cache, digest, cancel
        self.size = size
        self._changed = threading.Condition()
        self._state = _State.AWAITED
        self._descriptor = -1
        self._count = 0

    @property
    def is_lost(self) -> bool:
        """Whether what was read must not be used."""
        with self._changed:
            return self._state is _State.LOST

    @property
    def is_whole(self) -> bool:
        """Whether the blob is in the cache."""
        with self._changed:
            return self._state is _State.WHOLE

    def begin(self, descriptor: int, count: int) -> None:
        """The first `count` bytes are in the file `descriptor`, which stays open until the end."""
        with self._changed:
            if self._state is _State.AWAITED:
                self._state, self._descriptor, self._count = _State.ARRIVING, descriptor, count
                self._changed.notify_all()

    def grow(self, count: int) -> None:
        """So many bytes are in the file now."""
        with self._changed:
            self._count = count
            self._changed.notify_all()

    def finish(self) -> None:
        """The blob is verified and has its name in the cache."""
        self._end(_State.WHOLE)

    def lose(self) -> None:
        """The blob does not come, or begins again; nothing happens if it is whole."""
        self._end(_State.LOST)

    def _end(self, state: _State) -> None:
        with self._changed:
            if self._state not in (_State.WHOLE, _State.LOST):
                self._state, self._descriptor = state, -1
                self._changed.notify_all()

    def open(self) -> BinaryIO | ArrivingFile:
        """The blob from its beginning; waits until it begins to arrive.

        Raises:
            Cancelled: it is lost, or the caller cancelled.
        """
        with self._changed:
            self._wait(lambda: self._state is not _State.AWAITED)
            if self._state is _State.ARRIVING:
                return ArrivingFile(self, os.dup(self._descriptor))
        return self._cache.open_layer(self._digest)

    def wait_for(self, position: int) -> int:
        """How many bytes after `position` can be read; waits for the first, and is 0 at the blob's end.

        Raises:
            Cancelled: it is lost, or the caller cancelled.
        """
        with self._changed:
            self._wait(
                lambda: self._state is not _State.ARRIVING or self._count > position or position >= self.size
            )
            count = self.size if self._state is _State.WHOLE else self._count
        return max(0, count - position)

    def _wait(self, until: Callable[[], bool]) -> None:
        if not until():
            self._cancel.on_cancel(self._wake)
            try:
                while not self._cancel.event.is_set() and not until():
                    self._changed.wait()
            finally:
                self._cancel.forget(self._wake)
        self._cancel.check()
        if self._state is _State.LOST:
            raise Cancelled(f"layer {self._digest} does not arrive")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class ArrivingFile:
    """Reads a blob from its beginning as far as it has arrived; a context manager that closes it."""

    def __init__(self, arrival: Arrival, descriptor: int) -> None:
        self._arrival, self._descriptor = arrival, descriptor
        self._position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes (one chunk if negative); nothing at the end of the blob only.

        Raises:
            Cancelled: the blob is lost, or the caller cancelled.
        """
        there = self._arrival.wait_for(self._position)
        data = os.pread(self._descriptor, min(there, size if size >= 0 else _CHUNK), self._position)
        self._position += len(data)
        return data

    def seek(self, position: int) -> int:
        """Go on reading at `position`, counted from the beginning."""
        self._position = position
        return position
