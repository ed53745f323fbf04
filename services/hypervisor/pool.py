"""The warm pool: restored machines that wait, stopped and claimed by nobody, for a box to take one.

A machine in the pool holds nothing of any box: it has been restored, has answered once, and stands
still. A second pool of the same kind is of machines that were started, confined, and not restored yet.
Both belong to the service and end with it in order; what waits restored outlives one that is killed
(`services.hypervisor.adoption`). Boxes never wait for a pool to be filled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from services.common.errors import VoidboxError
from services.hypervisor.box import Box
from services.hypervisor.model import BoxConfig
from services.hypervisor.templates import Key

log = logging.getLogger(__name__)

CALM_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the pool may take: machines per template, seconds a template stays in it unused, MiB in all."""

    size: int
    idle_seconds: float
    memory_mib: int


@dataclass(slots=True)
class _Shelf:
    """The machines of one template."""

    waiting: list[Box] = field(default_factory=list)
    filling: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None


class Pool:
    """The machines that wait.

    Args:
        bounds: What it may take.
        make: Restores a machine for the pool; raises if there is no room for it.
        end: Ends and removes one; never raises.
        quiet: Returns when no box is being started.
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        make: Callable[[Key, BoxConfig], Awaitable[Box]],
        end: Callable[[Box], Awaitable[None]],
        quiet: Callable[[], Awaitable[object]],
    ) -> None:
        self._bounds = bounds
        self._make = make
        self._end = end
        self._quiet = quiet
        self._shelves: dict[str, _Shelf] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()

    @property
    def boxes(self) -> list[Box]:
        """The machines that wait."""
        return [box for shelf in self._shelves.values() for box in shelf.waiting]

    def count(self, template_id: str) -> int:
        """How many machines of a template wait."""
        shelf = self._shelves.get(template_id)
        return len(shelf.waiting) if shelf else 0

    def take(self, template_id: str) -> Box | None:
        """A machine of the template, which is the caller's from now on; None if none waits."""
        shelf = self._shelves.get(template_id)
        while shelf is not None and shelf.waiting:
            box = shelf.waiting.pop(0)
            if box.runs:
                return box
            self._discard(box)
        return None

    def want(self, key: Key, config: BoxConfig) -> None:
        """Note that boxes are made from this template, and fill its place in the pool in the background."""
        if self._bounds.size <= 0:
            return
        shelf = self._shelf(key.id)
        if shelf.filling is None or shelf.filling.done():
            shelf.filling = asyncio.create_task(self._fill(shelf, key, config), name=f"pool {key.id}")

    def has_room(self, template_id: str) -> bool:
        """Whether one more machine of the template may wait."""
        return self.count(template_id) < self._bounds.size and self._taken_mib() < self._bounds.memory_mib

    def put(self, template_id: str, box: Box) -> None:
        """Take up a machine that has waited before; it waits as long as if it had just been wanted."""
        self._shelf(template_id).waiting.append(box)
        log.info("machine %s goes on waiting in the pool", box.id)

    def _shelf(self, template_id: str) -> _Shelf:
        """The template's shelf, used just now."""
        shelf = self._shelves.setdefault(template_id, _Shelf())
        if shelf.timer is not None:
            shelf.timer.cancel()
        loop = asyncio.get_running_loop()
        shelf.timer = loop.call_later(self._bounds.idle_seconds, self.forget, template_id)
        return shelf

    async def _fill(self, shelf: _Shelf, key: Key, config: BoxConfig) -> None:
        while len(shelf.waiting) < self._bounds.size:
            await self._quiet()
            # The box that has just come up runs its first program now; filling takes a processor for a while.
            await asyncio.sleep(CALM_SECONDS)
            await self._quiet()
            async with self._one_at_a_time:
                taken = await asyncio.to_thread(self._taken_mib)
                if taken >= self._bounds.memory_mib:
                    log.info("the pool has %d MiB of %d; it stays as it is", taken, self._bounds.memory_mib)
                    return
                try:
                    box = await self._make(key, config)
                except (VoidboxError, OSError) as error:
                    log.warning("the pool of template %s is not filled: %s", key.id, error)
                    return
                shelf.waiting.append(box)
                log.info("machine %s waits", box.id)

    def _taken_mib(self) -> int:
        return sum(box.usage().proportional for box in self.boxes) >> 20

    def forget(self, template_id: str) -> None:
        """End the machines of a template. Idempotent."""
        shelf = self._shelves.pop(template_id, None)
        if shelf is None:
            return
        if shelf.timer is not None:
            shelf.timer.cancel()
        if shelf.filling is not None:
            shelf.filling.cancel()
        for box in shelf.waiting:
            self._discard(box)

    def clear(self) -> list[Box]:
        """End all, to make room; returns them."""
        released = self.boxes
        for template_id in list(self._shelves):
            self.forget(template_id)
        return released

    def _discard(self, box: Box) -> None:
        task = asyncio.ensure_future(self._end(box))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """End all machines and wait until they are gone."""
        tasks = [shelf.filling for shelf in self._shelves.values() if shelf.filling is not None]
        self.clear()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._ending, return_exceptions=True)
