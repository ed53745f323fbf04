"""Telling watchers about boxes: each sees every box's newest state, however slowly it reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from services.hypervisor.model import BoxRecord

Change = tuple[BoxRecord, bool]
"""A box as it is now, and whether it has been deleted."""


class Watchers:
    """The watchers of one registry. What a slow one has not read yet is replaced by what is newer."""

    def __init__(self) -> None:
        self._queues: set[_Queue] = set()

    def changed(self, record: BoxRecord) -> None:
        """A box has changed."""
        self._tell(record, deleted=False)

    def deleted(self, record: BoxRecord) -> None:
        """A box is gone."""
        self._tell(record, deleted=True)

    def _tell(self, record: BoxRecord, *, deleted: bool) -> None:
        for queue in self._queues:
            queue.put(record, deleted=deleted)

    async def follow(self, present: Iterable[BoxRecord], box_id: str) -> AsyncIterator[Change]:
        """Yield `present`, then changes; of one box only, until it is deleted, if `box_id` is set."""
        queue = _Queue(box_id)
        for record in present:
            queue.put(record, deleted=False)
        self._queues.add(queue)
        try:
            while True:
                change = await queue.get()
                yield change
                if box_id and change[1]:
                    return
        finally:
            self._queues.discard(queue)


class _Queue:
    def __init__(self, box_id: str) -> None:
        self._box_id = box_id
        self._waiting: dict[str, Change] = {}
        self._news = asyncio.Event()

    def put(self, record: BoxRecord, *, deleted: bool) -> None:
        if not self._box_id or record.id == self._box_id:
            self._waiting[record.id] = (record, deleted)
            self._news.set()

    async def get(self) -> Change:
        while not self._waiting:
            self._news.clear()
            await self._news.wait()
        return self._waiting.pop(next(iter(self._waiting)))
