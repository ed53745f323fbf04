"""Upper limits for what an image may make us do; each is generous for real images."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from services.common.errors import Cancelled

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is refused, with a clear error, instead of filling memory or disk.

    Attributes:
        unpacked_bytes: Decompressed size of all layers of one image together.
        compressed_bytes: Size of one layer blob.
        entries: Tar members of all layers together (about 500 bytes of memory each).
        metadata_bytes: Names, link targets and extended attributes of all entries together.
        layers: Layers of one image; overlay-based engines stop near 127.
        manifest_bytes: A manifest or index (registries accept at most 4 MiB).
        config_bytes: An image configuration.
    """

    unpacked_bytes: int = 64 * GIB
    compressed_bytes: int = 32 * GIB
    entries: int = 4_000_000
    metadata_bytes: int = 512 * MIB
    layers: int = 512
    manifest_bytes: int = 4 * MIB
    config_bytes: int = 8 * MIB


@dataclass(slots=True, eq=False)
class Cancel:
    """Tells worker threads to stop, and wakes those that wait on a socket by closing it."""

    event: threading.Event = field(default_factory=threading.Event)
    _closers: list[Callable[[], None]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        """Ask everything that holds this to stop; safe to call twice, from any thread."""
        self.event.set()
        with self._lock:
            closers, self._closers = self._closers, []
        for close in closers:
            close()

    def on_cancel(self, close: Callable[[], None]) -> None:
        """Have `close` called by `cancel`; at once if that has happened already."""
        with self._lock:
            if not self.event.is_set():
                self._closers.append(close)
                return
        close()

    def forget(self, close: Callable[[], None]) -> None:
        """Take back `on_cancel`."""
        with self._lock:
            if close in self._closers:
                self._closers.remove(close)

    def check(self) -> None:
        """Raise `Cancelled` if `cancel` was called."""
        if self.event.is_set():
            raise Cancelled("the caller cancelled")
