"""Makes the disk of an image while its layers arrive, instead of after them.

Nothing is trusted earlier for it: a disk gets its name when each layer's tar had the sum that the
image's configuration demands, and the pull ends with an error unless each blob has its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from services.common.errors import VoidboxError
from services.imager.arrival import Arrival
from services.imager.cache import ImageCache
from services.imager.disk import Disk, LayerBlob, build_disk
from services.imager.limits import Cancel, Limits
from services.imager.progress import Progress, Report


class EarlyDisk:
    """One disk under way in a thread of its own; a context manager that ends it.

    Its user holds the cache's `COLLECT_LOCK`, shared.

    Args:
        free_mib: As for `build_disk`.
    """

    def __init__(self, cache: ImageCache, free_mib: int, limits: Limits, report: Report) -> None:
        self._cache, self._free_mib, self._limits, self._report = cache, free_mib, limits, report
        self._cancel = Cancel()
        self._arrivals: dict[str, Arrival] = {}
        self._thread: threading.Thread | None = None
        self._disk: Disk | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel.cancel()
        if self._thread is not None:
            self._thread.join()

    def begin(self, layers: Sequence[LayerBlob]) -> None:
        """Start to make the disk of `layers`; whoever brings those that are missing tells `arrival`."""
        for layer in layers:
            if not self._cache.has_blob(layer.digest, layer.size):
                self._arrivals[layer.digest] = Arrival(self._cache, layer.digest, layer.size, self._cancel)
        self._thread = threading.Thread(target=self._run, args=(layers,), name="early-disk", daemon=True)
        self._thread.start()

    def arrival(self, digest: str) -> Arrival | None:
        """Whom to tell about a layer; None if nobody waits for it."""
        return self._arrivals.get(digest)

    def cancel(self) -> None:
        """Give up."""
        self._cancel.cancel()

    def result(self) -> Disk | None:
        """The disk, for who knows that all layers are in the cache; None if it must be made anew.

        Raises:
            VoidboxError: as `build_disk`.
        """
        if self._thread is None:
            return None
        for arrival in self._arrivals.values():
            arrival.finish()  # those that another process brought before this one asked for them
        self._thread.join()
        if any(arrival.is_lost for arrival in self._arrivals.values()):
            return None
        if self._error is not None:
            raise self._error
        return self._disk

    def _run(self, layers: Sequence[LayerBlob]) -> None:
        try:
            self._disk = build_disk(
                self._cache,
                layers,
                free_mib=self._free_mib,
                limits=self._limits,
                cancel=self._cancel,
                report=self._tell,
                open_layer=self._open,
            )
        except VoidboxError as error:
            self._error = error
        except BaseException as error:
            self._error = error
            raise

    def _open(self, digest: str) -> Any:
        arrival = self._arrivals.get(digest)
        return self._cache.open_layer(digest) if arrival is None else arrival.open()

    def _tell(self, progress: Progress) -> None:
        """Pass on what is done once all layers are here: until then their arrival is what is told."""
        if all(arrival.is_whole for arrival in self._arrivals.values()):
            self._report(progress)
