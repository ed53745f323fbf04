"""What the gateway of a stage's box decides, into the run's log while it happens."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from services.common.errors import VoidboxError
from services.orchestrator import records as r
from services.orchestrator.context import RunContext
from services.orchestrator.peers import is_broken
from services.orchestrator.plan import PlannedStage

log = logging.getLogger(__name__)

# A hypervisor that is being started again.
_AGAIN_SECONDS = 1.0


class EgressLog:
    """Follows one box's gateway for the length of the block; at its end all that was written is read.

    How far it has read is stored with the stage, after the events: after a kill of this process a batch
    may be in the log twice, but none is missing.
    """

    def __init__(self, context: RunContext, planned: PlannedStage, box_id: str) -> None:
        self._context = context
        self._planned = planned
        self._box_id = box_id
        self._task: asyncio.Task[None] | None = None
        self._keeping: asyncio.Future[None] | None = None

    async def __aenter__(self) -> EgressLog:
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._keeping is not None:
            await asyncio.gather(self._keeping, return_exceptions=True)
        try:
            await self._read(follow=False)
        except VoidboxError as error:
            log.warning("the end of the egress log of box %s is lost: %s", self._box_id, error.message)

    async def _follow(self) -> None:
        while True:
            try:
                await self._read(follow=True)
                return
            except VoidboxError as error:
                if not is_broken(error):
                    log.warning("the egress log of box %s: %s", self._box_id, error.message)
                    return
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _read(self, *, follow: bool) -> None:
        offset = self._context.facts[self._planned.name].egress_offset
        batches = self._context.peers.read_egress(self._box_id, offset, follow=follow)
        async with contextlib.aclosing(batches):
            async for offset, events in batches:
                # Not cut in two by a cancellation: else the events would be there without their offset.
                self._keeping = asyncio.ensure_future(self._keep(offset, events))
                await asyncio.shield(self._keeping)

    async def _keep(self, offset: int, events: list[bytes]) -> None:
        await self._context.log(self._planned.name, *(r.Egress(data=event) for event in events))
        await self._context.learn(self._planned, egress_offset=offset)
