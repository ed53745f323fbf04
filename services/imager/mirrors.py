"""One image in several registries: each mirror in turn, at last the image's own."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final, Self, TypeVar

from services.common.errors import Corrupt, Denied, InvalidInput, NotFound, Unauthenticated, Unavailable
from services.imager.limits import Cancel, Limits
from services.imager.manifest import Descriptor
from services.imager.reference import RegistryReference
from services.imager.registries_conf import endpoints
from services.imager.registry import RegistrySource
from services.imager.registry_settings import RegistrySettings
from services.imager.sources import BlobSink, Source

log = logging.getLogger(__name__)

# What one registry may have wrong and another right; not a full disk, not the caller's wish to stop.
_ELSEWHERE: Final = (Corrupt, Denied, InvalidInput, NotFound, Unauthenticated, Unavailable)
_MIRROR_ATTEMPTS: Final = 2  # of each request to a mirror; then the next is asked
Result = TypeVar("Result")


class MirroredSource:
    """A source of several; a context manager.

    Content is what its digest says wherever it comes from, so a download that breaks at one registry
    goes on at the next. What the tag means, the first that answers says.

    Args:
        sources: Best first; the last one's errors are told.
    """

    def __init__(self, sources: Sequence[RegistrySource]) -> None:
        self._sources = list(sources)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for source in self._sources:
                stack.enter_context(source)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def root(self) -> tuple[bytes, str]:
        """The manifest or index that the reference names."""
        return self._first(lambda source: source.root())

    def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest or index, verified."""
        return self._first(lambda source: source.manifest(descriptor))

    def small_blob(self, descriptor: Descriptor) -> bytes:
        """A blob, verified, in memory."""
        return self._first(lambda source: source.small_blob(descriptor))

    def fetch(self, descriptor: Descriptor, sink: BlobSink) -> None:
        """Bring `sink` the rest of a blob."""
        self._first(lambda source: source.fetch(descriptor, sink))

    def _first(self, call: Callable[[RegistrySource], Result]) -> Result:
        *mirrors, last = self._sources
        for source in mirrors:
            try:
                return call(source)
            except _ELSEWHERE as error:
                log.warning("a mirror failed, asking the next: %s", error.message)
        return call(last)


def open_registry(
    reference: RegistryReference,
    *,
    insecure: bool,
    settings: RegistrySettings,
    limits: Limits,
    cancel: Cancel,
) -> AbstractContextManager[Source]:
    """The source of an image in a registry, by its mirrors if it has any; arguments as `RegistrySource`.

    Raises:
        Denied: the registry is blocked.
        InvalidInput: a file that lists mirrors is malformed.
    """
    places = endpoints(settings.registries_conf, reference, insecure)
    quick = dataclasses.replace(settings, attempts=min(settings.attempts, _MIRROR_ATTEMPTS))
    sources = [
        RegistrySource(
            place.reference,
            insecure=place.insecure,
            settings=settings if place is places[-1] else quick,
            limits=limits,
            cancel=cancel,
        )
        for place in places
    ]
    return sources[0] if len(sources) == 1 else MirroredSource(sources)
